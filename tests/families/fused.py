"""Text families whose experts lie fused on the hub."""

from tests.families.blocks import EXPERT_WIDTH, EXPERTS, HIDDEN, attention, ends, norms
from tests.families.configs import Config, causal
from tests.families.hybrids import mamba2
from tests.families.layout import Family, Fused, Layout

SPLIT = "{expert}.{part}"


def gpt_oss(stored: bool = False) -> Family:
    """gpt-oss: transposed, gate and up in turn, biases, sinks; in BF16, or as OpenAI ships it in MXFP4."""
    layout = Layout()
    ends(layout)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{prefix}.self_attn", bias=True, out_bias=True)
        layout.vector(f"{prefix}.self_attn.sinks", 4)
        layout.linear(f"{prefix}.mlp.router", EXPERTS, HIDDEN, bias=True)
        experts = f"{prefix}.mlp.experts"
        both = Fused(("gate_proj", "up_proj"), None, transposed=True, interleaved=True)
        layout.experts(f"{experts}.gate_up_proj", (EXPERTS, HIDDEN, 2 * EXPERT_WIDTH), both)
        layout.vector(f"{experts}.gate_up_proj_bias", EXPERTS, 2 * EXPERT_WIDTH)
        down = Fused(("down_proj",), None, transposed=True)
        layout.experts(f"{experts}.down_proj", (EXPERTS, EXPERT_WIDTH, HIDDEN), down)
        layout.vector(f"{experts}.down_proj_bias", EXPERTS, HIDDEN)
    config = causal(
        "gpt_oss",
        "GptOssForCausalLM",
        2,
        intermediate_size=EXPERT_WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        experts_per_token=2,
        sliding_window=16,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"],
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 64,
            "rope_type": "yarn",
            "truncate": False,
        },
    )
    if not stored:
        return Family("gpt-oss-bf16", config, layout, loading_shown=False)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    matrices = ("*.mlp.experts.gate_up_proj", "*.mlp.experts.down_proj")
    return Family("gpt-oss-mxfp4", config, layout, stored="mxfp4", quantized=matrices, loading_shown=False)


def granite_moe() -> Family:
    """Granite MoE: experts directly below `block_sparse_moe`, in tensors of linears that are none."""
    layout = Layout()
    ends(layout, head=None)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{prefix}.self_attn")
        granite_experts(layout, f"{prefix}.block_sparse_moe")
    return Family("granite-moe", _granite("granitemoe", "GraniteMoeForCausalLM"), layout)


def granite_hybrid() -> Family:
    """Granite 4: Mamba-2 and attention layers, fused experts and a shared MLP of two linears in each."""
    layout = Layout()
    ends(layout, head=None)
    for layer, kind in enumerate(("mamba", "attention", "mamba")):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        if kind == "attention":
            attention(layout, f"{prefix}.self_attn")
        else:
            mamba2(layout, f"{prefix}.mamba", inner=128, heads=8, groups=1, norm=True)
        granite_experts(layout, f"{prefix}.block_sparse_moe")
        layout.linear(f"{prefix}.shared_mlp.input_linear", 2 * 48, HIDDEN)
        layout.linear(f"{prefix}.shared_mlp.output_linear", HIDDEN, 48)
    config = _granite("granitemoehybrid", "GraniteMoeHybridForCausalLM") | {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 48,
        "position_embedding_type": "nope",
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }
    return Family("granite-4-hybrid", config, layout)


def granite_experts(layout: Layout, prefix: str) -> None:
    """`input_linear` [expert, 2 x width, hidden] with gate first, `output_linear` and the router."""
    both = Fused(("gate_proj", "up_proj"), f"{prefix}.experts.{SPLIT}")
    layout.experts(f"{prefix}.input_linear.weight", (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN), both)
    down = Fused(("down_proj",), f"{prefix}.experts.{SPLIT}")
    layout.experts(f"{prefix}.output_linear.weight", (EXPERTS, HIDDEN, EXPERT_WIDTH), down)
    layout.linear(f"{prefix}.router.layer", EXPERTS, HIDDEN)


def _granite(model_type: str, architecture: str) -> Config:
    config = causal(
        model_type,
        architecture,
        2,
        intermediate_size=EXPERT_WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        embedding_multiplier=1.5,
        residual_multiplier=0.5,
        attention_multiplier=0.0625,
        logits_scaling=2.0,
        attention_bias=False,
    )
    del config["head_dim"]
    return config
