"""Families of this year with layouts of their own: DeepSeek-V4, MiniMax-M3, Gemma 4 unified, Mistral 4."""

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HIDDEN,
    LATENT,
    PIXTRAL,
    VOCABULARY,
    attention,
    ends,
    experts,
    fused_experts,
    latent_attention,
    mlp,
    norms,
    pixtral_tower,
)
from tests.families.configs import PREPROCESSOR, causal, sizes, wrapper
from tests.families.gemma4 import gemma4_text_layers, gemma4_words
from tests.families.layout import Family, Layout


def deepseek_v4() -> Family:
    """DeepSeek-V4 in BF16: the flat names of its own code, streams that are mixed, compressed keys.

    transformers 5.14 keeps its norms in float32 and hands their outputs to bfloat16 linears, which fails.
    """
    layout = Layout()
    layout.embedding("embed", VOCABULARY, HIDDEN)
    layout.norm("norm", HIDDEN)
    layout.linear("head", VOCABULARY, HIDDEN)
    _streams(layout, "hc_head", 4, 1)
    for layer, sparse in enumerate((False, True)):
        prefix = f"layers.{layer}"
        norms(layout, prefix, "attn_norm", "ffn_norm")
        _streams(layout, f"{prefix}.hc_attn", 24, 3)
        _streams(layout, f"{prefix}.hc_ffn", 24, 3)
        attn = f"{prefix}.attn"
        layout.vector(f"{attn}.attn_sink", 4, dtype="float32")
        layout.linear(f"{attn}.wq_a", 48, HIDDEN)
        layout.norm(f"{attn}.q_norm", 48)
        layout.linear(f"{attn}.wq_b", 4 * 32, 48)
        layout.linear(f"{attn}.wkv", 32, HIDDEN)
        layout.norm(f"{attn}.kv_norm", 32)
        layout.linear(f"{attn}.wo_a", 2 * 16, 64)
        layout.linear(f"{attn}.wo_b", HIDDEN, 2 * 16)
        _compressor(layout, f"{attn}.compressor", 4 if sparse else 8, 2 if sparse else 1)
        if sparse:
            _compressor(layout, f"{attn}.indexer.compressor", 4, 2)
            layout.linear(f"{attn}.indexer.wq_b", 4 * 32, 48)
            layout.linear(f"{attn}.indexer.weights_proj", 4, HIDDEN)
        layout.linear(f"{prefix}.ffn.gate", EXPERTS, HIDDEN)
        layout.vector(f"{prefix}.ffn.gate.bias", EXPERTS, dtype="float32")
        experts(layout, f"{prefix}.ffn.experts", names=("w1", "w3", "w2"))
        for name, rows, columns in (
            ("w1", EXPERT_WIDTH, HIDDEN),
            ("w3", EXPERT_WIDTH, HIDDEN),
            ("w2", HIDDEN, EXPERT_WIDTH),
        ):
            layout.linear(f"{prefix}.ffn.shared_experts.{name}", rows, columns)
    config = causal("deepseek_v4", "DeepseekV4ForCausalLM", 2, rope_theta=10000.0) | {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 48,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
        "sliding_window": 16,
        "hc_mult": 4,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        "compress_rope_theta": 160000.0,
        "qk_rope_head_dim": 16,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "scoring_func": "sqrtsoftplus",
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "num_nextn_predict_layers": 0,
    }
    del config["intermediate_size"]
    return Family("deepseek-v4", config, layout, loading_shown=False, runs=False)


def _streams(layout: Layout, prefix: str, rows: int, scales: int) -> None:
    layout.vector(f"{prefix}_fn", rows, 4 * HIDDEN, dtype="float32")
    layout.vector(f"{prefix}_base", rows, dtype="float32")
    layout.vector(f"{prefix}_scale", scales, around=1.0, dtype="float32")


def _compressor(layout: Layout, prefix: str, rate: int, halves: int) -> None:
    layout.vector(f"{prefix}.ape", rate, halves * 32, dtype="float32")
    layout.linear(f"{prefix}.wkv", halves * 32, HIDDEN)
    layout.linear(f"{prefix}.wgate", halves * 32, HIDDEN)
    layout.norm(f"{prefix}.norm", 32)


def minimax_m3() -> Family:
    """MiniMax-M3: an indexer of blocks in sparse layers, gate and up apart on the hub one in the class."""
    layout = Layout()
    text = "language_model.model"
    ends(layout, text, "language_model.lm_head", around=0.0)
    for layer, sparse in enumerate((False, True)):
        prefix = f"{text}.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm", around=0.0)
        attention(layout, f"{prefix}.self_attn", head_norms=0.0)
        if not sparse:
            mlp(layout, f"{prefix}.mlp")
            continue
        attn, block = f"{prefix}.self_attn", f"{prefix}.block_sparse_moe"
        layout.linear(f"{attn}.index_q_proj", 2 * 16, HIDDEN)
        layout.linear(f"{attn}.index_k_proj", 16, HIDDEN)
        layout.norm(f"{attn}.index_q_norm", 16, around=0.0)
        layout.norm(f"{attn}.index_k_norm", 16, around=0.0)
        layout.linear(f"{block}.gate", EXPERTS, HIDDEN)
        layout.vector(f"{block}.e_score_correction_bias", EXPERTS, dtype="float32")
        mlp(layout, f"{block}.shared_experts", EXPERT_WIDTH)
        experts(layout, f"{block}.experts", names=("w1", "w3", "w2"))
    tower = "vision_tower.vision_model"
    layout.conv(f"{tower}.embeddings.patch_embedding", 32, 3, 2, 4, 4)
    layout.norm(f"{tower}.pre_layrnorm", 32, bias=True)
    encoder = f"{tower}.encoder.layers.0"
    for name in ("layer_norm1", "layer_norm2"):
        layout.norm(f"{encoder}.{name}", 32, bias=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layout.linear(f"{encoder}.self_attn.{name}", 32, 32, bias=True)
    layout.linear(f"{encoder}.mlp.fc1", 64, 32, bias=True)
    layout.linear(f"{encoder}.mlp.fc2", 32, 64, bias=True)
    layout.linear("multi_modal_projector.linear_1", HIDDEN, 32, bias=True)
    layout.linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN, bias=True)
    layout.linear("patch_merge_mlp.linear_1", HIDDEN, 4 * HIDDEN, bias=True)
    layout.linear("patch_merge_mlp.linear_2", HIDDEN, HIDDEN, bias=True)
    words = sizes(
        2,
        model_type="minimax_m3_vl_text",
        rope_theta=5000000.0,
        intermediate_size=EXPERT_WIDTH,
        dense_intermediate_size=96,
        shared_intermediate_size=EXPERT_WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        rotary_dim=8,
        routed_scaling_factor=2.0,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        index_local_blocks=1,
    )
    vision = {
        "model_type": "minimax_m3_vl_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    more = {"image_token_index": 380, "video_token_index": 381, "projector_hidden_size": HIDDEN}
    architecture = "MiniMaxM3SparseForConditionalGeneration"
    config = wrapper("minimax_m3_vl", architecture, words, vision, **more)
    return Family("minimax-m3", config, layout, files=PREPROCESSOR, loading_shown=False)


def gemma4_unified() -> Family:
    """Gemma 4 unified: no tower, patches go through one linear into the language model."""
    layout = Layout()
    text = "model.language_model"
    ends(layout, text, None)
    gemma4_text_layers(layout, text, moe=False)
    vision = "model.vision_embedder"
    layout.norm(f"{vision}.patch_ln1", 192, bias=True)
    layout.linear(f"{vision}.patch_dense", 32, 192, bias=True)
    layout.norm(f"{vision}.patch_ln2", 32, bias=True)
    layout.vector(f"{vision}.pos_embedding", 16, 2, 32)
    layout.norm(f"{vision}.pos_norm", 32, bias=True)
    layout.linear("model.embed_vision.embedding_projection", HIDDEN, 32)
    words = gemma4_words(2) | {
        "model_type": "gemma4_unified_text",
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    patches = {
        "model_type": "gemma4_unified_vision",
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 32,
        "mm_posemb_size": 16,
        "output_proj_dims": 32,
    }
    architecture = "Gemma4UnifiedForConditionalGeneration"
    more = {"image_token_id": 380, "video_token_id": 381, "audio_token_id": 382, "boi_token_id": 376}
    more |= {"eoi_token_id": 377, "boa_token_id": 378, "eoa_token_index": 379}
    config = wrapper("gemma4_unified", architecture, words, patches, **more)
    config |= {"audio_config": None, "tie_word_embeddings": True}
    return Family("gemma-4-unified", config, layout, files=PREPROCESSOR, loading_shown=False)


def mistral4() -> Family:
    """Mistral 4: latent attention and fused experts behind a Pixtral tower."""
    layout = Layout()
    text = "language_model.model"
    ends(layout, text, "language_model.lm_head")
    for layer in range(2):
        prefix = f"{text}.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        latent_attention(layout, f"{prefix}.self_attn")
        layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
        mlp(layout, f"{prefix}.mlp.shared_experts", EXPERT_WIDTH)
        fused_experts(layout, f"{prefix}.mlp.experts")
    pixtral_tower(layout, "vision_tower")
    layout.norm("multi_modal_projector.norm", 32)
    layout.linear("multi_modal_projector.patch_merger.merging_layer", 32, 128)
    layout.linear("multi_modal_projector.linear_1", HIDDEN, 32)
    layout.linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN)
    words = sizes(
        2,
        model_type="mistral4",
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=EXPERT_WIDTH,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        rope_parameters={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
        },
        **LATENT,
    )
    del words["head_dim"]
    more = {
        "image_token_index": 380,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    }
    config = wrapper("mistral3", "Mistral3ForConditionalGeneration", words, PIXTRAL, **more)
    return Family("mistral-4", config, layout, files=PREPROCESSOR)
