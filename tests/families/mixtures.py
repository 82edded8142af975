"""Mixtures of experts that the hub stores one by one."""

from typing import Any

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HEAD,
    HIDDEN,
    attention,
    ends,
    experts,
    mlp,
    norms,
)
from tests.families.configs import MOE, causal
from tests.families.deepseek import FP8_BLOCKS, moe_layer, v3_config
from tests.families.dense import PRE, Decoder, changed, decoder_attention
from tests.families.layout import Family, Layout

W123 = ("w1", "w3", "w2")


def mixture(
    name: str,
    model_type: str,
    architecture: str,
    how: Decoder | None = None,
    *,
    block: str = "mlp",
    names: tuple[str, str, str] | None = None,
    **more: Any,
) -> Family:
    """A family of two layers, both with experts behind a router `gate`; `more` as for dense ones."""
    how = how or Decoder()
    layout = Layout()
    ends(layout, around=how.around)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *how.norms, around=how.around)
        decoder_attention(layout, f"{prefix}.self_attn", how)
        layout.linear(f"{prefix}.{block}.gate", EXPERTS, HIDDEN)
        experts(layout, f"{prefix}.{block}.experts", names=names)
    return Family(name, changed(causal(model_type, architecture, 2) | MOE, more), layout)


LOCAL: dict[str, Any] = {
    "num_local_experts": EXPERTS,
    "intermediate_size": EXPERT_WIDTH,
    "num_experts": None,
    "moe_intermediate_size": None,
    "norm_topk_prob": None,
}


def mixtral() -> Family:
    """Mixtral."""
    where: dict[str, Any] = {"block": "block_sparse_moe", "names": W123}
    more = LOCAL | {"head_dim": None, "sliding_window": None}
    return mixture("mixtral", "mixtral", "MixtralForCausalLM", **where, **more)


def phi_moe() -> Family:
    """Phi-3.5-MoE: LayerNorms, biases on attention and head."""
    where: dict[str, Any] = {"block": "block_sparse_moe", "names": W123}
    how = Decoder(bias=True, out_bias=True)
    more = LOCAL | {
        "attention_bias": True,
        "lm_head_bias": True,
        "head_dim": None,
        "router_jitter_noise": 0.01,
    }
    more |= {"sliding_window": 16, "input_jitter_noise": 0.01}
    family = mixture("phi-moe", "phimoe", "PhimoeForCausalLM", how, **where, **more)
    for norm in ("model.norm", *(f"model.layers.{layer}.{name}" for layer in range(2) for name in PRE)):
        family.layout.vector(f"{norm}.bias", HIDDEN)
    family.layout.vector("lm_head.bias", 384)
    return family


def minimax_m2(fp8: bool = False) -> Family:
    """MiniMax-M2: q_norm and k_norm over all heads, a router with a bias; released in FP8 blocks."""
    where: dict[str, Any] = {"block": "block_sparse_moe", "names": W123}
    more = LOCAL | {"scoring_func": "sigmoid", "use_qk_norm": True, "rotary_dim": 8, "use_routing_bias": True}
    name = "minimax-m2-fp8" if fp8 else "minimax-m2"
    family = mixture(name, "minimax_m2", "MiniMaxM2ForCausalLM", Decoder(wide_norms=True), **where, **more)
    for layer in range(2):
        bias = f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"
        family.layout.vector(bias, EXPERTS, dtype="float32")
    if not fp8:
        return family
    kept = ["gate", "e_score_correction_bias", "lm_head"]
    config = family.config | {"quantization_config": FP8_BLOCKS | {"modules_to_not_convert": kept}}
    return Family(
        name, config, family.layout, (), "fp8_block", ("*.self_attn.*_proj.weight", "*.w[123].weight")
    )


def qwen2_moe() -> Family:
    """Qwen1.5-MoE: a shared expert behind a gate of its own, biases on q, k and v."""
    more: dict[str, Any] = {"shared_expert_intermediate_size": 48, "norm_topk_prob": False, "head_dim": None}
    more |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "qkv_bias": True}
    family = mixture("qwen2-moe", "qwen2_moe", "Qwen2MoeForCausalLM", Decoder(bias=True), **more)
    for layer in range(2):
        mlp(family.layout, f"model.layers.{layer}.mlp.shared_expert", 48)
        family.layout.linear(f"model.layers.{layer}.mlp.shared_expert_gate", 1, HIDDEN)
    return family


def qwen3_moe(fp8: bool = False) -> Family:
    """Qwen3-30B-A3B, and its FP8 release in blocks."""
    more = {"decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False}
    name = "qwen3-moe-fp8" if fp8 else "qwen3-moe"
    family = mixture(name, "qwen3_moe", "Qwen3MoeForCausalLM", Decoder(head_norms=1.0), **more)
    if not fp8:
        return family
    kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]
    kept += [f"model.layers.{layer}.{norm}" for layer in range(2) for norm in PRE]
    config = family.config | {"quantization_config": FP8_BLOCKS | {"modules_to_not_convert": kept}}
    return Family(name, config, family.layout, (), "fp8_block", ("*_proj.weight",))


def olmoe() -> Family:
    """OLMoE: q_norm and k_norm over all heads."""
    more = LOCAL | {
        "num_local_experts": None,
        "num_experts": EXPERTS,
        "norm_topk_prob": False,
        "head_dim": None,
    }
    return mixture("olmoe", "olmoe", "OlmoeForCausalLM", Decoder(wide_norms=True), **more)


def ernie_moe() -> Family:
    """ERNIE 4.5 21B-A3B: a dense layer first, router statistics in a place of their own, MTP tensors."""
    layout = Layout()
    ends(layout, head=None)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *PRE)
        attention(layout, f"{prefix}.self_attn")
        if layer == 0:
            mlp(layout, f"{prefix}.mlp")
            continue
        layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
        layout.vector(f"{prefix}.mlp.moe_statics.e_score_correction_bias", 1, EXPERTS, dtype="float32")
        mlp(layout, f"{prefix}.mlp.shared_experts", 2 * EXPERT_WIDTH)
        experts(layout, f"{prefix}.mlp.experts")
    norms(layout, "model.mtp_block.0", *PRE)
    attention(layout, "model.mtp_block.0.self_attn")
    mlp(layout, "model.mtp_block.0.mlp")
    norms(layout, "model", "mtp_emb_norm.0", "mtp_hidden_norm.0")
    layout.linear("model.mtp_linear_proj.0", HIDDEN, 2 * HIDDEN)
    more = {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
        "num_nextn_predict_layers": 1,
        "use_bias": False,
        "tie_word_embeddings": True,
    }
    config = causal("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", 2) | more
    return Family("ernie-4.5-moe", config, layout, unbuilt=("model.mtp_*",))


def hunyuan_moe() -> Family:
    """Hunyuan A13B: a float32 router `gate.wg`, a shared MLP, norms of each head behind the rotation."""
    layout = Layout()
    ends(layout, head=None)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *PRE)
        attention(layout, f"{prefix}.self_attn")
        layout.norm(f"{prefix}.self_attn.query_layernorm", HEAD)
        layout.norm(f"{prefix}.self_attn.key_layernorm", HEAD)
        layout.linear(f"{prefix}.mlp.gate.wg", EXPERTS, HIDDEN, dtype="float32")
        mlp(layout, f"{prefix}.mlp.shared_mlp", EXPERT_WIDTH)
        experts(layout, f"{prefix}.mlp.experts")
    more = {"num_experts": EXPERTS, "moe_topk": [2, 2], "intermediate_size": EXPERT_WIDTH}
    config = causal("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", 2, tie_word_embeddings=True) | more
    config |= {"moe_intermediate_size": [EXPERT_WIDTH] * 2, "num_shared_expert": [1, 1], "use_qk_norm": True}
    return Family("hunyuan-moe", config, layout)


def hy3() -> Family:
    """Hunyuan 3: a dense layer first, the router under `router.gate`."""
    layout = Layout()
    ends(layout)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *PRE)
        attention(layout, f"{prefix}.self_attn", head_norms=1.0)
        if layer == 0:
            mlp(layout, f"{prefix}.mlp")
            continue
        layout.linear(f"{prefix}.mlp.router.gate", EXPERTS, HIDDEN)
        layout.vector(f"{prefix}.mlp.expert_bias", EXPERTS, dtype="float32")
        mlp(layout, f"{prefix}.mlp.shared_mlp", EXPERT_WIDTH)
        experts(layout, f"{prefix}.mlp.experts")
    more = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH}
    more |= {"num_shared_experts": 1, "first_k_dense_replace": 1, "router_scaling_factor": 2.5}
    more |= {"mlp_layer_types": ["dense", "sparse"]}
    return Family("hunyuan-3", causal("hy_v3", "HYV3ForCausalLM", 2) | more, layout)


def mimo_v2() -> Family:
    """MiMo-V2-Flash: sliding layers with other heads and a sink, values narrower than keys."""
    layout = Layout()
    ends(layout)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *PRE)
        heads = 2 * (1 + layer)
        attn = f"{prefix}.self_attn"
        layout.linear(f"{attn}.q_proj", 4 * 24, HIDDEN)
        layout.linear(f"{attn}.k_proj", heads * 24, HIDDEN)
        layout.linear(f"{attn}.v_proj", heads * 16, HIDDEN)
        layout.linear(f"{attn}.o_proj", HIDDEN, 4 * 16)
        if layer == 0:
            mlp(layout, f"{prefix}.mlp")
            continue
        layout.vector(f"{attn}.attention_sink_bias", 4)
        layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
        layout.vector(f"{prefix}.mlp.gate.e_score_correction_bias", EXPERTS, dtype="float32")
        experts(layout, f"{prefix}.mlp.experts")
    config = causal("mimo_v2_flash", "MiMoV2FlashForCausalLM", 2)
    del config["rope_theta"]
    rope = {"rope_type": "default", "partial_rotary_factor": 1.0}
    config |= {
        "head_dim": 24,
        "v_head_dim": 16,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {
            "full_attention": rope | {"rope_theta": 5000000.0},
            "sliding_attention": rope | {"rope_theta": 10000.0},
        },
    }
    return Family("mimo-v2-flash", config, layout)


def glm4_flash() -> Family:
    """GLM-4.7-Flash: DeepSeek's attention and experts under a model type of its own, with an MTP layer."""
    layout = Layout()
    ends(layout)
    for layer in range(3):
        moe_layer(layout, f"model.layers.{layer}", dense=layer == 0, mtp=layer == 2)
    config = v3_config("glm4_moe_lite", "Glm4MoeLiteForCausalLM") | {
        "n_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    }
    return Family("glm-4.7-flash", config, layout, unbuilt=("model.layers.2.*",))
