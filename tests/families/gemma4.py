"""Gemma 4 as Google ships it, a mixture and one whose last layers share K and V; and Gemma 3n, its elder."""

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HIDDEN,
    VOCABULARY,
    attention,
    ends,
    fused_experts,
    mlp,
    norms,
)
from tests.families.configs import PREPROCESSOR, Config, causal, sizes, wrapper
from tests.families.layout import Family, Layout


def gemma4_moe() -> Family:
    """Gemma 4 26B-A4B: fused experts, K for V in full attention, a vision tower, a tied head."""
    layout = Layout()
    text = "model.language_model"
    ends(layout, text, None)
    gemma4_text_layers(layout, text, moe=True)
    gemma4_tower(layout)
    words = gemma4_words(2) | {
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
    }
    return Family("gemma-4-26b-a4b", gemma4_config(words), layout, files=PREPROCESSOR)


def gemma4_e2b() -> Family:
    """Gemma 4 E2B: embeddings per layer, and K and V of the layers that share them, which no class builds."""
    layout = Layout()
    text = "model.language_model"
    ends(layout, text, None)
    layout.embedding(f"{text}.embed_tokens_per_layer", 384, 4 * 16)
    layout.linear(f"{text}.per_layer_model_projection", 4 * 16, HIDDEN)
    layout.norm(f"{text}.per_layer_projection_norm", 16)
    for layer in range(4):
        prefix = f"{text}.layers.{layer}"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norms(layout, prefix, f"{name}_layernorm")
        norms(layout, prefix, "post_per_layer_input_norm")
        head = 32 if layer % 2 else 16
        layout.linear(f"{prefix}.self_attn.q_proj", 4 * head, HIDDEN)
        layout.linear(f"{prefix}.self_attn.k_proj", head, HIDDEN)
        layout.linear(f"{prefix}.self_attn.v_proj", head, HIDDEN)
        layout.linear(f"{prefix}.self_attn.o_proj", HIDDEN, 4 * head)
        layout.norm(f"{prefix}.self_attn.q_norm", head)
        layout.norm(f"{prefix}.self_attn.k_norm", head)
        mlp(layout, f"{prefix}.mlp", 192 if layer >= 2 else 96)
        layout.linear(f"{prefix}.per_layer_input_gate", 16, HIDDEN)
        layout.linear(f"{prefix}.per_layer_projection", HIDDEN, 16)
        layout.vector(f"{prefix}.layer_scalar", 1, around=0.8)
    gemma4_tower(layout)
    words = gemma4_words(4) | {
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 384,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    shared = tuple(
        f"{text}.layers.{layer}.self_attn.{name}.*" for layer in (2, 3) for name in ("[kv]_proj", "k_norm")
    )
    return Family("gemma-4-e2b", gemma4_config(words), layout, unbuilt=shared, files=PREPROCESSOR)


def gemma4_tower(layout: Layout) -> None:
    """Gemma 4's vision tower and the projection behind it: one layer of width 32."""
    tower = "model.vision_tower"
    layout.vector(f"{tower}.patch_embedder.position_embedding_table", 2, 16, 32)
    layout.linear(f"{tower}.patch_embedder.input_proj", 32, 3 * 16)
    layer = f"{tower}.encoder.layers.0"
    for name in ("q", "k", "v", "o"):
        layout.linear(f"{layer}.self_attn.{name}_proj.linear", 32, 32)
    layout.norm(f"{layer}.self_attn.q_norm", 16)
    layout.norm(f"{layer}.self_attn.k_norm", 16)
    layout.linear(f"{layer}.mlp.gate_proj.linear", 64, 32)
    layout.linear(f"{layer}.mlp.up_proj.linear", 64, 32)
    layout.linear(f"{layer}.mlp.down_proj.linear", 32, 64)
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        layout.norm(f"{layer}.{name}_layernorm", 32)
    layout.linear("model.embed_vision.embedding_projection", HIDDEN, 32)


def gemma4_words(layers: int) -> Config:
    """The text part of Gemma 4's config.json."""
    words = sizes(layers, model_type="gemma4_text", hidden_activation="gelu_pytorch_tanh", sliding_window=16)
    del words["hidden_act"]
    rope = {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    return words | {
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "rope_parameters": rope,
    }


def gemma4_config(words: Config) -> Config:
    """Gemma 4's config.json, without audio."""
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 16,
        "pooling_kernel_size": 2,
        "standardize": False,
    }
    more = {"image_token_id": 380, "video_token_id": 381, "audio_token_id": 382, "boi_token_id": 376}
    more |= {"eoi_token_id": 377, "boa_token_id": 378, "eoa_token_index": 379}
    own = wrapper("gemma4", "Gemma4ForConditionalGeneration", words, vision, **more)
    return own | {"audio_config": None, "tie_word_embeddings": True}


def gemma4_text_layers(layout: Layout, prefix: str, *, moe: bool) -> None:
    """Two layers of Gemma 4 26B-A4B's language model: sliding, then full attention with K for V.

    The dense MLP runs beside the experts, each behind a norm of its own; the router has scales of its own
    too.
    """
    for layer, full in enumerate((False, True)):
        here = f"{prefix}.layers.{layer}"
        norms(layout, here, "input_layernorm", "post_attention_layernorm")
        norms(layout, here, "pre_feedforward_layernorm", "post_feedforward_layernorm")
        head, keys = (32, 32) if full else (16, 32)
        layout.linear(f"{here}.self_attn.q_proj", 4 * head, HIDDEN)
        layout.linear(f"{here}.self_attn.k_proj", keys, HIDDEN)
        if not full:
            layout.linear(f"{here}.self_attn.v_proj", keys, HIDDEN)
        layout.linear(f"{here}.self_attn.o_proj", HIDDEN, 4 * head)
        layout.norm(f"{here}.self_attn.q_norm", head)
        layout.norm(f"{here}.self_attn.k_norm", head)
        for name, rows, columns in (("gate", 96, HIDDEN), ("up", 96, HIDDEN), ("down", HIDDEN, 96)):
            layout.linear(f"{here}.mlp.{name}_proj", rows, columns)
        layout.vector(f"{here}.layer_scalar", 1, around=0.8)
        if moe:
            norms(layout, here, "pre_feedforward_layernorm_2")
            norms(layout, here, "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
            layout.linear(f"{here}.router.proj", EXPERTS, HIDDEN)
            layout.vector(f"{here}.router.scale", HIDDEN, around=1.0)
            layout.vector(f"{here}.router.per_expert_scale", EXPERTS, around=1.0)
            fused_experts(layout, f"{here}.experts")


def gemma3n() -> Family:
    """Gemma 3n's language model: AltUp, LAuReL, embeddings per layer, layers that share K and V."""
    layout = Layout()
    ends(layout, head=None)
    layout.embedding("model.embed_tokens_per_layer", VOCABULARY, 4 * 16)
    layout.linear("model.per_layer_model_projection", 4 * 16, HIDDEN)
    layout.norm("model.per_layer_projection_norm", 16)
    for number in range(1):
        layout.linear(f"model.altup_projections.{number}", HIDDEN, HIDDEN)
        layout.linear(f"model.altup_unembed_projections.{number}", HIDDEN, HIDDEN)
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            norms(layout, prefix, f"{name}_layernorm")
        norms(layout, prefix, "post_per_layer_input_norm", "laurel.post_laurel_norm", "altup.router_norm")
        attention(layout, f"{prefix}.self_attn", head_norms=1.0)
        mlp(layout, f"{prefix}.mlp")
        layout.vector(f"{prefix}.altup.correct_output_scale", HIDDEN, around=1.0)
        layout.linear(f"{prefix}.altup.correction_coefs", 2, 2)
        layout.linear(f"{prefix}.altup.prediction_coefs", 4, 2)
        layout.linear(f"{prefix}.altup.modality_router", 2, HIDDEN)
        layout.linear(f"{prefix}.laurel.linear_left", 16, HIDDEN)
        layout.linear(f"{prefix}.laurel.linear_right", HIDDEN, 16)
        layout.linear(f"{prefix}.per_layer_input_gate", 16, HIDDEN)
        layout.linear(f"{prefix}.per_layer_projection", HIDDEN, 16)
    config = causal("gemma3n_text", "Gemma3nForCausalLM", 4) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "intermediate_size": [96] * 4,
        "laurel_rank": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    }
    del config["hidden_act"]
    shared = tuple(
        f"model.layers.{layer}.self_attn.{name}.*" for layer in (2, 3) for name in ("[kv]_proj", "k_norm")
    )
    return Family("gemma-3n-text", config, layout, unbuilt=shared)
