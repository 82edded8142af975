"""Families with state space or convolution layers, and others whose layers differ."""

from typing import Any

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HIDDEN,
    VOCABULARY,
    attention,
    ends,
    experts,
    mlp,
    norms,
)
from tests.families.configs import MOE, causal
from tests.families.layout import Family, Layout


def qwen3_next() -> Family:
    """Qwen3-Next: linear attention with two wide projections, experts one by one, `mtp.*`."""
    layout = Layout()
    ends(layout, around=0.0)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        if layer == 0:
            mixer = f"{prefix}.linear_attn"
            layout.linear(f"{mixer}.in_proj_qkvz", 2 * 32 + 2 * 64, HIDDEN)
            layout.linear(f"{mixer}.in_proj_ba", 8, HIDDEN)
            layout.conv(f"{mixer}.conv1d", 128, 1, 4)
            layout.vector(f"{mixer}.dt_bias", 4)
            layout.vector(f"{mixer}.A_log", 4, around=1.0)
            layout.norm(f"{mixer}.norm", 16)
            layout.linear(f"{mixer}.out_proj", HIDDEN, 64)
        _qwen3_next_layer(layout, prefix, full=layer == 1)
    layout.linear("mtp.fc", HIDDEN, 2 * HIDDEN)
    _qwen3_next_layer(layout, "mtp.layers.0", full=True)
    norms(layout, "mtp", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", around=0.0)
    more = MOE | {
        "shared_expert_intermediate_size": EXPERT_WIDTH,
        "full_attention_interval": 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "partial_rotary_factor": 0.25,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "layer_types": ["linear_attention", "full_attention"],
    }
    config = causal("qwen3_next", "Qwen3NextForCausalLM", 2, **more)
    return Family("qwen3-next", config, layout, unbuilt=("mtp.*",))


def _qwen3_next_layer(layout: Layout, prefix: str, full: bool) -> None:
    norms(layout, prefix, "input_layernorm", "post_attention_layernorm", around=0.0)
    if full:
        layout.linear(f"{prefix}.self_attn.q_proj", 128, HIDDEN)
        layout.linear(f"{prefix}.self_attn.k_proj", 32, HIDDEN)
        layout.linear(f"{prefix}.self_attn.v_proj", 32, HIDDEN)
        layout.linear(f"{prefix}.self_attn.o_proj", HIDDEN, 64)
        layout.norm(f"{prefix}.self_attn.q_norm", 16, around=0.0)
        layout.norm(f"{prefix}.self_attn.k_norm", 16, around=0.0)
    layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
    experts(layout, f"{prefix}.mlp.experts")
    mlp(layout, f"{prefix}.mlp.shared_expert", EXPERT_WIDTH)
    layout.linear(f"{prefix}.mlp.shared_expert_gate", 1, HIDDEN)


def nemotron_h() -> Family:
    """Nemotron 3 Nano: `backbone.`, one mixer a layer (Mamba-2, experts, attention, MLP), relu² without a
    gate."""
    layout = Layout()
    layout.embedding("backbone.embeddings", VOCABULARY, HIDDEN)
    layout.norm("backbone.norm_f", HIDDEN)
    layout.linear("lm_head", VOCABULARY, HIDDEN)
    for layer, kind in enumerate("ME*-"):
        prefix = f"backbone.layers.{layer}"
        mixer = f"{prefix}.mixer"
        norms(layout, prefix, "norm")
        if kind == "M":
            mamba2(layout, mixer, inner=64, heads=4, groups=2)
        elif kind == "E":
            layout.linear(f"{mixer}.gate", EXPERTS, HIDDEN)
            layout.vector(f"{mixer}.gate.e_score_correction_bias", EXPERTS, dtype="float32")
            for expert in range(EXPERTS):
                layout.linear(f"{mixer}.experts.{expert}.up_proj", EXPERT_WIDTH, HIDDEN)
                layout.linear(f"{mixer}.experts.{expert}.down_proj", HIDDEN, EXPERT_WIDTH)
            layout.linear(f"{mixer}.shared_experts.up_proj", 48, HIDDEN)
            layout.linear(f"{mixer}.shared_experts.down_proj", HIDDEN, 48)
        elif kind == "*":
            attention(layout, mixer)
        else:
            layout.linear(f"{mixer}.up_proj", 96, HIDDEN)
            layout.linear(f"{mixer}.down_proj", HIDDEN, 96)
    config = causal("nemotron_h", "NemotronHForCausalLM", 4) | {
        "hybrid_override_pattern": "ME*-",
        "layer_norm_epsilon": 1e-05,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 16,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "moe_shared_expert_intermediate_size": 48,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    for key in ("rope_theta", "rms_norm_eps", "hidden_act"):
        del config[key]
    return Family("nemotron-3-nano", config, layout)


def mamba2(layout: Layout, prefix: str, inner: int, heads: int, groups: int, norm: bool = True) -> None:
    """A Mamba-2 mixer with a state of 16."""
    wide = inner + 2 * groups * 16
    layout.linear(f"{prefix}.in_proj", inner + wide + heads, HIDDEN)
    layout.conv(f"{prefix}.conv1d", wide, 1, 4, bias=True)
    layout.vector(f"{prefix}.dt_bias", heads, around=1.0)
    layout.vector(f"{prefix}.A_log", heads, around=1.0)
    layout.vector(f"{prefix}.D", heads, around=1.0)
    if norm:
        layout.norm(f"{prefix}.norm", inner)
    layout.linear(f"{prefix}.out_proj", HIDDEN, inner)


def falcon_h1() -> Family:
    """Falcon-H1: Mamba-2 and attention side by side in each layer, with multipliers."""
    layout = Layout()
    layout.embedding("model.embed_tokens", VOCABULARY, HIDDEN)
    layout.norm("model.final_layernorm", HIDDEN)
    layout.linear("lm_head", VOCABULARY, HIDDEN)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "pre_ff_layernorm")
        attention(layout, f"{prefix}.self_attn")
        mamba2(layout, f"{prefix}.mamba", inner=64, heads=4, groups=1, norm=False)
        mlp(layout, f"{prefix}.feed_forward")
    config = causal("falcon_h1", "FalconH1ForCausalLM", 2) | {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 1,
        "mamba_chunk_size": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": False,
        "projectors_bias": False,
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.5,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.5,
        "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35],
        "mlp_multipliers": [0.9, 0.4],
    }
    return Family("falcon-h1", config, layout)


def jamba() -> Family:
    """Jamba: Mamba-1 and attention layers, experts in every other one."""
    layout = Layout()
    layout.embedding("model.embed_tokens", VOCABULARY, HIDDEN)
    layout.norm("model.final_layernorm", HIDDEN)
    layout.linear("lm_head", VOCABULARY, HIDDEN)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "pre_ff_layernorm")
        feed = f"{prefix}.feed_forward"
        if layer == 0:
            mamba = f"{prefix}.mamba"
            layout.linear(f"{mamba}.in_proj", 2 * 128, HIDDEN)
            layout.conv(f"{mamba}.conv1d", 128, 1, 4, bias=True)
            layout.linear(f"{mamba}.x_proj", 16 + 2 * 16, 128)
            layout.linear(f"{mamba}.dt_proj", 128, 16, bias=True)
            layout.linear(f"{mamba}.out_proj", HIDDEN, 128)
            layout.vector(f"{mamba}.A_log", 128, 16, around=1.0)
            layout.vector(f"{mamba}.D", 128, around=1.0)
            for name in ("dt_layernorm", "b_layernorm", "c_layernorm"):
                layout.norm(f"{mamba}.{name}", 16)
            mlp(layout, feed)
        else:
            attention(layout, f"{prefix}.self_attn")
            layout.linear(f"{feed}.router", EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                mlp(layout, f"{feed}.experts.{expert}")
    config = causal("jamba", "JambaForCausalLM", 2) | {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 16,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "use_mamba_kernels": False,
    }
    for key in ("rope_theta", "head_dim"):
        del config[key]
    return Family("jamba", config, layout)


def lfm2_moe() -> Family:
    """LFM2-MoE: short convolutions and attention, a dense layer first, a tied head."""
    layout = Layout()
    layout.embedding("model.embed_tokens", VOCABULARY, HIDDEN)
    layout.norm("model.embedding_norm", HIDDEN)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "operator_norm", "ffn_norm")
        feed = f"{prefix}.feed_forward"
        if layer == 0:
            layout.linear(f"{prefix}.conv.in_proj", 3 * HIDDEN, HIDDEN)
            layout.conv(f"{prefix}.conv.conv", HIDDEN, 1, 3)
            layout.linear(f"{prefix}.conv.out_proj", HIDDEN, HIDDEN)
            layout.linear(f"{feed}.w1", 96, HIDDEN)
            layout.linear(f"{feed}.w3", 96, HIDDEN)
            layout.linear(f"{feed}.w2", HIDDEN, 96)
            continue
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("out_proj", HIDDEN)):
            layout.linear(f"{prefix}.self_attn.{name}", rows, HIDDEN)
        layout.norm(f"{prefix}.self_attn.q_layernorm", 16)
        layout.norm(f"{prefix}.self_attn.k_layernorm", 16)
        layout.linear(f"{feed}.gate", EXPERTS, HIDDEN)
        layout.vector(f"{feed}.expert_bias", EXPERTS, dtype="float32")
        experts(layout, f"{feed}.experts", names=("w1", "w3", "w2"))
    more: dict[str, Any] = MOE | {
        "norm_eps": 1e-05,
        "num_dense_layers": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "layer_types": ["conv", "full_attention"],
        "tie_word_embeddings": True,
    }
    config = causal("lfm2_moe", "Lfm2MoeForCausalLM", 2, **more)
    for key in ("head_dim", "rms_norm_eps", "hidden_act"):
        del config[key]
    return Family("lfm2-moe", config, layout)
