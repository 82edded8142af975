"""A small model to judge recipes on where a person has none at hand: two layers of Qwen3-MoE's kind, one a
mixture whose experts the class stores fused, one dense.
"""

from transformers import Qwen3MoeConfig

from stages.model.skeleton import Skeleton
from state.source import TensorEntry

HIDDEN, HEADS, EXPERTS, VOCABULARY = 256, 4, 2, 128
"""Widths that blocks of every format divide."""


def reference_model() -> Skeleton:
    """The model without weights."""
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        mlp_only_layers=[1],
        vocab_size=VOCABULARY,
        dtype="bfloat16",
    )
    return Skeleton(config, _tensors())


def _tensors() -> dict[str, TensorEntry]:
    square = (HIDDEN, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{leaf}_proj.weight": square for leaf in "qkvo"}
        shapes |= {f"{layer}.self_attn.{leaf}_norm.weight": (HIDDEN // HEADS,) for leaf in "qk"}
        shapes |= {f"{layer}.{leaf}_layernorm.weight": (HIDDEN,) for leaf in ("input", "post_attention")}
    experts = [f"model.layers.0.mlp.experts.{number}" for number in range(EXPERTS)]
    for owner in (*experts, "model.layers.1.mlp"):
        shapes |= {f"{owner}.{leaf}_proj.weight": square for leaf in ("gate", "up", "down")}
    shapes["model.layers.0.mlp.gate.weight"] = (EXPERTS, HIDDEN)
    return {name: TensorEntry(name, "BF16", shape, "", 0, 0) for name, shape in shapes.items()}
