"""Small random models of the families that the layerwise schedule is tested on, saved as checkpoints."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, set_seed

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
HALF_SLIDING = {"sliding_window": 8, "layer_types": ALTERNATING}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DEEPSEEK = {
    **LATENT,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
GEMMA4 = {**HALF_SLIDING, "global_head_dim": 32, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3": ("gemma3_text", {**HALF_SLIDING}),
    "gemma3n": (
        "gemma3n_text",
        {
            **HALF_SLIDING,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "laurel_rank": 4,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        },
    ),
    "gemma4": ("gemma4_text", {**GEMMA4, "vocab_size_per_layer_input": 96}),
    "gemma4_moe": (
        "gemma4_text",
        {**HALF_SLIDING, "global_head_dim": 32, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
         "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {**DEEPSEEK, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2,
         "indexer_types": ["full", "full", "shared", "shared"], "mlp_layer_types": ["dense", "sparse",
         "sparse", "sparse"]},
    ),
    "bamba": (
        "bamba",
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
         "mamba_chunk_size": 16},
    ),
    "glm4_moe": (
        "glm4_moe", {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
         "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": ("gpt_oss", {**HALF_SLIDING, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "llama4": (
        "llama4_text", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
         "no_rope_layers": [1, 1, 1, 0], "interleave_moe_layer_step": 2},
    ),
    "nemotron_h": (
        "nemotron_h",
        {**MAMBA, "layers_block_type": ["mamba", "moe", "attention", "moe"], "n_routed_experts": 6,
         "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
         "n_group": 1, "topk_group": 1},
    ),
    "qwen3_next": (
        "qwen3_next",
        {**EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 24,
         "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]},
    ),
    "jamba": (
        "jamba",
        {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_groups": 1,
         "mamba_chunk_size": 16},
    ),
}  # fmt: skip


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a family's small model."""
    kind, settings = FAMILIES[family]
    return AutoConfig.for_model(kind, **{**SMALL, **settings})


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Make a family's small model with random weights, save it as the hub has it, and return its folder."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Enough spread for routers to choose all experts, and norms that aren't 1.
            scale = 0.3 if parameter.dim() > 1 else 0.1
            if not name.endswith(("A_log", "dt_bias", ".D")):
                parameter.add_(torch.randn_like(parameter) * scale)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return folder
