"""What the names of a checkpoint don't say about folding, family by family.

Consumers of a norm are observed in calibration. The rest stands here: which norms were checked, whether they
multiply by 1 + weight, consumers that the observation misses, and places where folding would change the
model. A family that is missing here is not folded at all; the tests fold every family of the table and
compare logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Facts about one model type. Names are relative to the decoder layer, with `E` for the expert number.

    Attributes:
        norms: norms that can be divided → consumers to add to the observed ones where the checkpoint has
            them: routers that are no `nn.Linear`, experts that read the norm's output times a router score.
        plus_one: these norms multiply by 1 + weight.
        impossible: module whose input can't be scaled → the reason.
    """

    norms: Mapping[str, tuple[str, ...]]
    plus_one: bool = False
    impossible: Mapping[str, str] = field(default_factory=dict)


DENSE = Family({"input_layernorm": (), "post_attention_layernorm": ()})
DENSE_PLUS_ONE = Family(DENSE.norms, plus_one=True)
SANDWICH_PLUS_ONE = Family({"input_layernorm": (), "pre_feedforward_layernorm": ()}, plus_one=True)
MOE = Family({"input_layernorm": (), "post_attention_layernorm": ("mlp.gate",)})
GATED_SHARED_EXPERT = {
    "input_layernorm": (),
    "post_attention_layernorm": ("mlp.gate", "mlp.shared_expert_gate"),
}

FAMILIES: dict[str, Family] = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "qwen3_vl_text": DENSE,
    "qwen2_moe": Family(GATED_SHARED_EXPERT),
    "qwen3_moe": MOE,
    "qwen3_vl_moe_text": MOE,
    "glm4_moe": MOE,
    "mixtral": Family({"input_layernorm": (), "post_attention_layernorm": ("block_sparse_moe.gate",)}),
    "deepseek_v3": Family({**MOE.norms, "self_attn.q_a_layernorm": (), "self_attn.kv_a_layernorm": ()}),
    "gemma": DENSE_PLUS_ONE,
    "gemma2": SANDWICH_PLUS_ONE,
    "gemma3_text": SANDWICH_PLUS_ONE,
    "gemma4_text": Family(
        {"input_layernorm": (), "pre_feedforward_layernorm": (), "pre_feedforward_layernorm_2": ()},
        impossible={"self_attn.o_proj": "v_norm stands between v_proj and o_proj and would undo the scale"},
    ),
    "nemotron": DENSE_PLUS_ONE,
    "nemotron_h": Family({"norm": ("mixer.gate",), "mixer.norm": ()}),
    "qwen3_next": Family(
        GATED_SHARED_EXPERT,
        plus_one=True,
        impossible={"linear_attn.out_proj": "the norm before it shares one weight over all heads"},
    ),
    "gpt_oss": Family(
        {"input_layernorm": (), "post_attention_layernorm": ("mlp.router",)},
        impossible={"mlp.experts.E.down_proj": "up is clamped and used as up + 1"},
    ),
    "llama4_text": Family(
        {
            "input_layernorm": (),
            "post_attention_layernorm": (
                "feed_forward.router",
                "feed_forward.experts.E.gate_proj",
                "feed_forward.experts.E.up_proj",
            ),
        }
    ),
}
