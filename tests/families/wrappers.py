"""Vision-language checkpoints, text models inside a wrapper, and their towers."""

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HIDDEN,
    LATENT,
    PIXTRAL,
    QUERIES,
    attention,
    ends,
    experts,
    fused_experts,
    latent_attention,
    mlp,
    norms,
    pixtral_tower,
    siglip_tower,
)
from tests.families.configs import PREPROCESSOR, sizes, wrapper
from tests.families.layout import Family, Layout


def mistral3(ministral: bool = False) -> Family:
    """Mistral Small 3.x and Ministral 3: Mistral behind a Pixtral tower; `language_model.model.` on the
    hub."""
    layout = Layout()
    ends(layout, "language_model.model", "language_model.lm_head")
    for layer in range(2):
        prefix = f"language_model.model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{prefix}.self_attn")
        mlp(layout, f"{prefix}.mlp")
    pixtral_tower(layout, "vision_tower")
    layout.norm("multi_modal_projector.norm", 32)
    layout.linear("multi_modal_projector.patch_merger.merging_layer", 32, 128)
    layout.linear("multi_modal_projector.linear_1", HIDDEN, 32)
    layout.linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN)
    text = sizes(2, model_type="ministral3" if ministral else "mistral", sliding_window=None)
    if ministral:
        text["rope_parameters"] = {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
        }
    else:
        text["rope_theta"] = 1000000000.0
    more = {
        "image_token_index": 380,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    }
    config = wrapper("mistral3", "Mistral3ForConditionalGeneration", text, PIXTRAL, **more)
    files = PREPROCESSOR | {"tekken.json": '{"config": {"pattern": "x"}, "vocab": []}\n'}
    return Family("ministral-3" if ministral else "mistral-3", config, layout, files=files)


def gemma3() -> Family:
    """Gemma 3 conditional: SigLIP, (1 + weight) norms, a tied head; `language_model.model.` on the hub."""
    layout = Layout()
    ends(layout, "language_model.model", None, around=0.0)
    for layer in range(2):
        prefix = f"language_model.model.layers.{layer}"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norms(layout, prefix, f"{name}_layernorm", around=0.0)
        attention(layout, f"{prefix}.self_attn", head_norms=0.0)
        mlp(layout, f"{prefix}.mlp")
    siglip_tower(layout, "vision_tower.vision_model")
    layout.vector("multi_modal_projector.mm_input_projection_weight", 32, HIDDEN)
    layout.norm("multi_modal_projector.mm_soft_emb_norm", 32, around=0.0)
    text = sizes(2, model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh", sliding_window=16)
    text |= {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2, "tie_word_embeddings": True}
    text |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
    del text["hidden_act"]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_use_head": False,
    }
    more = {
        "image_token_index": 380,
        "boi_token_index": 378,
        "eoi_token_index": 379,
        "mm_tokens_per_image": 1,
    }
    config = wrapper("gemma3", "Gemma3ForConditionalGeneration", text, vision, **more)
    return Family("gemma-3", config, layout, files=PREPROCESSOR)


def llama4() -> Family:
    """Llama 4 conditional: fused, transposed experts, all of which see every token; `language_model.`
    kept."""
    layout = Layout()
    ends(layout, "language_model.model", "language_model.lm_head")
    llama4_text_layers(layout, "language_model.model")
    tower = "vision_model"
    layout.vector(f"{tower}.class_embedding", 32)
    layout.vector(f"{tower}.positional_embedding_vlm", 5, 32)
    layout.linear(f"{tower}.patch_embedding.linear", 32, 3 * 16)
    for name in ("layernorm_pre", "layernorm_post"):
        layout.norm(f"{tower}.{name}", 32, bias=True)
    layer = f"{tower}.model.layers.0"
    for name in ("input_layernorm", "post_attention_layernorm"):
        layout.norm(f"{layer}.{name}", 32, bias=True)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layout.linear(f"{layer}.self_attn.{name}", 32, 32, bias=True)
    layout.linear(f"{layer}.mlp.fc1", 128, 32, bias=True)
    layout.linear(f"{layer}.mlp.fc2", 32, 128, bias=True)
    layout.linear(f"{tower}.vision_adapter.mlp.fc1", 48, 128)
    layout.linear(f"{tower}.vision_adapter.mlp.fc2", 48, 48)
    layout.linear("multi_modal_projector.linear_1", HIDDEN, 48)
    text = sizes(
        2,
        model_type="llama4_text",
        rope_theta=500000.0,
        intermediate_size=EXPERT_WIDTH,
        intermediate_size_mlp=96,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=16,
        use_qk_norm=False,
        no_rope_layers=[1, 0],
        attn_temperature_tuning=True,
        floor_scale=16,
        attn_scale=0.1,
    )
    vision = {
        "model_type": "llama4_vision_model",
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 48,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "pixel_shuffle_ratio": 0.5,
        "rope_theta": 10000,
    }
    more = {"image_token_index": 380, "boi_token_index": 378, "eoi_token_index": 379}
    config = wrapper("llama4", "Llama4ForConditionalGeneration", text, vision, **more)
    return Family("llama-4", config, layout, files=PREPROCESSOR, loading_shown=False)


def kimi_k2_5() -> Family:
    """Kimi K2.5: DeepSeek-V3 behind a MoonViT; experts INT4 in groups of 32 (compressed-tensors)."""

    layout = Layout()
    text = "language_model.model"
    ends(layout, text, "language_model.lm_head")
    for layer in range(2):
        prefix = f"{text}.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        latent_attention(layout, f"{prefix}.self_attn")
        if layer == 0:
            mlp(layout, f"{prefix}.mlp")
            continue
        layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
        layout.vector(f"{prefix}.mlp.gate.e_score_correction_bias", EXPERTS, dtype="float32")
        mlp(layout, f"{prefix}.mlp.shared_experts", EXPERT_WIDTH)
        experts(layout, f"{prefix}.mlp.experts")
    width = 32
    tower = "vision_tower"
    layout.conv(f"{tower}.patch_embed.proj", width, 3, 4, 4, bias=True)
    layout.vector(f"{tower}.patch_embed.pos_emb.weight", 4, 4, width)
    block = f"{tower}.encoder.blocks.0"
    for name in (
        f"{block}.norm0",
        f"{block}.norm1",
        f"{tower}.encoder.final_layernorm",
        "mm_projector.pre_norm",
    ):
        layout.norm(name, width, bias=True)
    layout.linear(f"{block}.wqkv", 3 * width, width, bias=True)
    layout.linear(f"{block}.wo", width, width, bias=True)
    layout.linear(f"{block}.mlp.fc0", 64, width, bias=True)
    layout.linear(f"{block}.mlp.fc1", width, 64, bias=True)
    layout.linear("mm_projector.proj.0", 4 * width, 4 * width, bias=True)
    layout.linear("mm_projector.proj.2", HIDDEN, 4 * width, bias=True)
    words = sizes(
        2,
        model_type="deepseek_v3",
        rope_theta=50000.0,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=EXPERT_WIDTH,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        **LATENT,
    )
    del words["head_dim"]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    words["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
    }
    vision = {
        "model_type": "kimi_k25_vision",
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "pos_emb_time": 4,
    }
    config = wrapper("kimi_k25", "Kimi_K25ForConditionalGeneration", words, vision, image_token_id=380)
    config["projection_hidden_size"] = 32
    return Family(
        "kimi-k2.5-int4",
        config,
        layout,
        stored="int4",
        quantized=("*.mlp.experts.*.weight",),
        files=PREPROCESSOR,
    )


def llama4_text_layers(layout: Layout, prefix: str) -> None:
    """Two layers of Llama 4: experts and a shared expert in one, a dense MLP in the other."""
    for layer, moe in enumerate((False, True)):
        here = f"{prefix}.layers.{layer}"
        norms(layout, here, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{here}.self_attn", queries=QUERIES)
        feed = f"{here}.feed_forward"
        shared = f"{feed}.shared_expert" if moe else feed
        width = EXPERT_WIDTH if moe else 96
        for name, rows, columns in (("gate", width, HIDDEN), ("up", width, HIDDEN), ("down", HIDDEN, width)):
            layout.linear(f"{shared}.{name}_proj", rows, columns)
        if moe:
            layout.linear(f"{feed}.router", EXPERTS, HIDDEN)
            fused_experts(layout, f"{feed}.experts", transposed=True, out=None)
