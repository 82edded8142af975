"""Linears that serving engines load into one weight, so that they are quantized alike or not at all."""

ENGINE_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Names of the members of each group, beside each other in one module."""


def fused_with(module: str) -> list[str]:
    """The other members of a module's group, by name; none where it is in no group."""
    parent, _, leaf = module.rpartition(".")
    groups = [group for group in ENGINE_FUSED if leaf in group]
    return [f"{parent}.{other}" for group in groups for other in group if other != leaf]
