"""Scales of quantized KV caches: where engines look for them, and which engine reads what is said of them."""

from collections.abc import Collection

from stages.engines import Engine

K_SCALE, V_SCALE = "k_proj.k_scale", "v_proj.v_scale"


def kv_scale_names(attention: str) -> tuple[str, str]:
    """Where engines look for the cache scales of K and V: f32, one value each."""
    return f"{attention}.{K_SCALE}", f"{attention}.{V_SCALE}"


def attention_of(tensor: str) -> str | None:
    """The attention that a cache scale belongs to; None for any other tensor."""
    for leaf in (K_SCALE, V_SCALE):
        if tensor.endswith(f".{leaf}"):
            return tensor.removesuffix(f".{leaf}")
    return None


def kv_refusal(engine: Engine, kv: str) -> str | None:
    """Why an engine does not serve a cache of this format as it is meant; None: it does."""
    if kv == "FP8":
        return None
    if kv == "NVFP4":
        return "ignores an NVFP4 KV cache and keeps it in 16 bits" if engine == "vllm" else None
    return f"knows no KV cache in {kv}"


def attentions(linears: Collection[str]) -> list[str]:
    """Modules that have both `k_proj` and `v_proj`."""
    names = set(linears)
    return sorted(
        parent
        for parent, _, leaf in (name.rpartition(".") for name in names)
        if leaf == "k_proj" and f"{parent}.v_proj" in names
    )
