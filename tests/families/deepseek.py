"""DeepSeek's line: latent attention, routers with a bias, MTP layers past the last, FP8 in blocks."""

from typing import Any

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HIDDEN,
    LATENT,
    VOCABULARY,
    attention,
    ends,
    experts,
    latent_attention,
    mlp,
    norms,
)
from tests.families.configs import Config, causal
from tests.families.layout import Family, Layout

DENSE_WIDTH = 192  # more than one block of 128, and not a whole number of them
MTP = "model.layers.2.*"
FP8_BLOCKS: Config = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def deepseek_v3(fp8: bool = False) -> Family:
    """DeepSeek-V3 with its MTP layer, in BF16 or as released, with FP8 for all but routers, tables and
    head."""
    layout = Layout()
    ends(layout)
    for layer in range(3):
        moe_layer(layout, f"model.layers.{layer}", dense=layer == 0, mtp=layer == 2)
    config = v3_config("deepseek_v3", "DeepseekV3ForCausalLM")
    if not fp8:
        return Family("deepseek-v3", config, layout, unbuilt=(MTP,))
    config["quantization_config"] = FP8_BLOCKS
    matrices = ("*.self_attn.*_proj*.weight", "*.mlp.*_proj.weight", "*.eh_proj.weight")
    return Family("deepseek-v3-fp8", config, layout, (MTP,), "fp8_block", matrices)


def kimi_k2() -> Family:
    """Kimi K2: DeepSeek-V3's layout in FP8, without an MTP layer, under a model type of its own code."""
    layout = Layout()
    ends(layout)
    for layer in range(2):
        moe_layer(layout, f"model.layers.{layer}", dense=layer == 0, mtp=False)
    config = v3_config("deepseek_v3", "DeepseekV3ForCausalLM") | {"num_nextn_predict_layers": 0}
    config["quantization_config"] = FP8_BLOCKS
    matrices = ("*.self_attn.*_proj*.weight", "*.mlp.*_proj.weight")
    return Family("kimi-k2-fp8", config, layout, (), "fp8_block", matrices)


def deepseek_v2() -> Family:
    """DeepSeek-V2 Lite: queries of full rank, a softmax router without a bias."""
    layout = Layout()
    ends(layout)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        latent_attention(layout, f"{prefix}.self_attn", low_rank_queries=False)
        _feed(layout, prefix, dense=layer == 0, bias=False)
    more = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "q_lora_rank": None}
    config = v3_config("deepseek_v2", "DeepseekV2ForCausalLM") | more
    return Family("deepseek-v2-lite", config, layout)


def deepseek_v32(glm: bool = False) -> Family:
    """DeepSeek-V3.2 and GLM-5: V3 with an indexer that lets each token see its 8 best alone."""
    layout = Layout()
    ends(layout)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        moe_layer(layout, prefix, dense=layer == 0, mtp=layer == 2)
        indexer = f"{prefix}.self_attn.indexer"
        layout.linear(f"{indexer}.wq_b", 4 * 32, 48)
        layout.linear(f"{indexer}.wk", 32, HIDDEN)
        layout.norm(f"{indexer}.k_norm", 32, bias=True)
        layout.linear(f"{indexer}.weights_proj", 4, HIDDEN)
    index = {"index_topk": 8, "index_n_heads": 4, "index_head_dim": 32}
    if glm:
        config = v3_config("glm_moe_dsa", "GlmMoeDsaForCausalLM") | index
        return Family("glm-5", config, layout, unbuilt=(MTP,))
    config = v3_config("deepseek_v32", "DeepseekV32ForCausalLM") | index
    return Family("deepseek-v3.2", config, layout, unbuilt=(MTP,))


def glm4_moe() -> Family:
    """GLM-4.5: plain attention with biases and head norms, DeepSeek's experts and MTP layer."""
    layout = Layout()
    ends(layout)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{prefix}.self_attn", bias=True, head_norms=1.0)
        _feed(layout, prefix, dense=layer == 0)
        if layer == 2:
            _mtp(layout, prefix)
    config = v3_config("glm4_moe", "Glm4MoeForCausalLM")
    for key in LATENT:
        del config[key]
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}
    config |= {"use_qk_norm": True, "partial_rotary_factor": 0.5}
    return Family("glm-4.5", config, layout, unbuilt=(MTP,))


def moe_layer(layout: Layout, prefix: str, *, dense: bool, mtp: bool) -> None:
    """A layer of DeepSeek-V3; the one past the last has what multi-token prediction adds."""
    norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
    latent_attention(layout, f"{prefix}.self_attn")
    _feed(layout, prefix, dense)
    if mtp:
        _mtp(layout, prefix)


def v3_config(model_type: str, architecture: str) -> Config:
    """DeepSeek-V3's config.json, its groups of experts as V3 has them."""
    more: dict[str, Any] = {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "attention_bias": False,
    }
    config = causal(
        model_type, architecture, 2, rope_theta=10000.0, intermediate_size=DENSE_WIDTH, **more | LATENT
    )
    del config["head_dim"]
    return config


def _feed(layout: Layout, prefix: str, dense: bool, bias: bool = True) -> None:
    if dense:
        mlp(layout, f"{prefix}.mlp", DENSE_WIDTH)
        return
    layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
    if bias:
        layout.vector(f"{prefix}.mlp.gate.e_score_correction_bias", EXPERTS, dtype="float32")
    mlp(layout, f"{prefix}.mlp.shared_experts", EXPERT_WIDTH)
    experts(layout, f"{prefix}.mlp.experts")


def _mtp(layout: Layout, prefix: str) -> None:
    norms(layout, prefix, "enorm", "hnorm")
    layout.linear(f"{prefix}.eh_proj", HIDDEN, 2 * HIDDEN)
    layout.embedding(f"{prefix}.embed_tokens", VOCABULARY, HIDDEN)
    layout.norm(f"{prefix}.shared_head.norm", HIDDEN)
    layout.linear(f"{prefix}.shared_head.head", VOCABULARY, HIDDEN)
