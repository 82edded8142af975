"""Groups that engines load as one matrix."""

import pytest

from stages.model.engine_fused import fused_with


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("layers.0.self_attn.k_proj", ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]),
        ("layers.0.mlp.up_proj", ["layers.0.mlp.gate_proj"]),
        ("layers.0.mlp.down_proj", []),
    ],
)
def test_the_others_of_a_group(module: str, others: list[str]) -> None:
    assert fused_with(module) == others
