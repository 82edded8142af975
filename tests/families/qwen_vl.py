"""Qwen's vision-language checkpoints, Qwen3.5 and its `mtp.*` among them."""

from tests.families.blocks import (
    EXPERT_WIDTH,
    EXPERTS,
    HIDDEN,
    QWEN_TOWER,
    attention,
    ends,
    fused_experts,
    gated_delta,
    mlp,
    norms,
    qwen_tower,
)
from tests.families.configs import MOE, PREPROCESSOR, TOKENS, causal, sizes, wrapper
from tests.families.layout import Family, Layout


def qwen3_vl(moe: bool = False) -> Family:
    """Qwen3-VL; its experts are fused and transposed on the hub."""
    layout = Layout()
    text = "model.language_model"
    ends(layout, text)
    for layer in range(2):
        prefix = f"{text}.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{prefix}.self_attn", head_norms=1.0)
        if moe:
            layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
            fused_experts(layout, f"{prefix}.mlp.experts", transposed=True)
        else:
            mlp(layout, f"{prefix}.mlp")
    qwen_tower(layout, "model.visual", deepstack=True)
    rope = {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}}
    words = sizes(2, rope_theta=500000.0, **rope) | (MOE | {"decoder_sparse_step": 1} if moe else {})
    name = "qwen3_vl_moe" if moe else "qwen3_vl"
    architecture = "Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"
    text_config = words | {"model_type": f"{name}_text"}
    vision = QWEN_TOWER | {"model_type": name, "deepstack_visual_indexes": [0]}
    config = wrapper(name, architecture, text_config, vision, tie_word_embeddings=False, **TOKENS)
    return Family("qwen3-vl-moe" if moe else "qwen3-vl", config, layout, files=PREPROCESSOR)


def qwen2_5_vl() -> Family:
    """Qwen2.5-VL as the hub has it: text keys flat in config.json, `visual.` beside `model.` in the file."""
    layout = Layout()
    ends(layout)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, "input_layernorm", "post_attention_layernorm")
        attention(layout, f"{prefix}.self_attn", bias=True)
        mlp(layout, f"{prefix}.mlp")
    width = 32
    layout.conv("visual.patch_embed.proj", width, 3, 2, 4, 4)
    norm_names = ("visual.blocks.0.norm1", "visual.blocks.0.norm2", "visual.merger.ln_q")
    for name in norm_names:
        layout.norm(name, width)
    layout.linear("visual.blocks.0.attn.qkv", 3 * width, width, bias=True)
    layout.linear("visual.blocks.0.attn.proj", width, width, bias=True)
    layout.linear("visual.blocks.0.mlp.gate_proj", 64, width, bias=True)
    layout.linear("visual.blocks.0.mlp.up_proj", 64, width, bias=True)
    layout.linear("visual.blocks.0.mlp.down_proj", width, 64, bias=True)
    layout.linear("visual.merger.mlp.0", 4 * width, 4 * width, bias=True)
    layout.linear("visual.merger.mlp.2", HIDDEN, 4 * width, bias=True)
    vision = {
        "depth": 1,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": 64,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "spatial_patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    text = causal("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", 2, rope_theta=1000000.0)
    del text["head_dim"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 2, 2]}
    return Family("qwen2.5-vl", text | {"vision_config": vision} | TOKENS, layout, files=PREPROCESSOR)


def qwen3_5(moe: bool = False) -> Family:
    """Qwen3.5 and 3.6: linear and full attention with a gate in q, a vision tower, and `mtp.*` that no class
    builds. The experts of the mixture are fused, also in the MTP layer."""
    layout = Layout()
    text = "model.language_model"
    ends(layout, text, around=0.0)
    for layer, kind in enumerate(("linear", "full")):
        prefix = f"{text}.layers.{layer}"
        if kind == "linear":
            gated_delta(layout, f"{prefix}.linear_attn")
        _qwen3_5_layer(layout, prefix, moe, full=kind == "full")
    layout.linear("mtp.fc", HIDDEN, 2 * HIDDEN)
    _qwen3_5_layer(layout, "mtp.layers.0", moe, full=True)
    norms(layout, "mtp", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", around=0.0)
    qwen_tower(layout, "model.visual", deepstack=False)
    name = "qwen3_5_moe" if moe else "qwen3_5"
    words = sizes(
        2,
        layer_types=["linear_attention", "full_attention"],
        full_attention_interval=2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        attn_output_gate=True,
        mtp_num_hidden_layers=1,
        rope_parameters={
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000.0,
            "rope_type": "default",
        },
    )
    if moe:
        words |= MOE | {"shared_expert_intermediate_size": EXPERT_WIDTH}
        del words["intermediate_size"]
    architecture = "Qwen3_5MoeForConditionalGeneration" if moe else "Qwen3_5ForConditionalGeneration"
    vision = QWEN_TOWER | {"model_type": name, "deepstack_visual_indexes": []}
    text_config = words | {"model_type": f"{name}_text"}
    config = wrapper(name, architecture, text_config, vision, tie_word_embeddings=False, **TOKENS)
    files = PREPROCESSOR | {"video_preprocessor_config.json": "{}\n"}
    return Family("qwen3.5-moe" if moe else "qwen3.5", config, layout, unbuilt=("mtp.*",), files=files)


def _qwen3_5_layer(layout: Layout, prefix: str, moe: bool, full: bool) -> None:
    norms(layout, prefix, "input_layernorm", "post_attention_layernorm", around=0.0)
    if full:
        attention(layout, f"{prefix}.self_attn", queries=128, head_norms=0.0)
        o_proj = layout.tensors.pop(f"{prefix}.self_attn.o_proj.weight")
        assert o_proj.shape == (HIDDEN, 128)
        layout.linear(f"{prefix}.self_attn.o_proj", HIDDEN, 64)
    if moe:
        layout.linear(f"{prefix}.mlp.gate", EXPERTS, HIDDEN)
        fused_experts(layout, f"{prefix}.mlp.experts")
        mlp(layout, f"{prefix}.mlp.shared_expert", EXPERT_WIDTH)
        layout.linear(f"{prefix}.mlp.shared_expert_gate", 1, HIDDEN)
    else:
        mlp(layout, f"{prefix}.mlp")
