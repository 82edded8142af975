"""Tiny checkpoints as the hub has them, written by hand in hub names: quantized, and the same weights plain.

What a quantized tensor stands for is computed here by loops of its own, not by the product.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.stages.export.support import make_tokenizer

Tensors = dict[str, Tensor]
Quantize = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""Name and weight → what is stored for it, and the weight that this stands for."""

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 160,
    "intermediate_size": 272,
    "kv_lora_rank": 32,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 144,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 32,
    "vocab_size": 128,
}

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 32,
    "hidden_size": 160,
    "intermediate_size": 272,
    "max_position_embeddings": 128,
    "mlp_only_layers": [],
    "moe_intermediate_size": 144,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128,
}


def deepseek_v3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape, with one layer for multi-token prediction behind the last."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    layers = config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
        f"model.layers.{layers}.eh_proj.weight": (hidden, 2 * hidden),
        f"model.layers.{layers}.enorm.weight": (hidden,),
        f"model.layers.{layers}.hnorm.weight": (hidden,),
        f"model.layers.{layers}.shared_head.norm.weight": (hidden,),
        f"model.layers.{layers}.shared_head.head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(layers + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_a_proj.weight": (config["q_lora_rank"], hidden),
            f"{at}.self_attn.q_a_layernorm.weight": (config["q_lora_rank"],),
            f"{at}.self_attn.q_b_proj.weight": (heads * (nope + rope), config["q_lora_rank"]),
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": (config["kv_lora_rank"] + rope, hidden),
            f"{at}.self_attn.kv_a_layernorm.weight": (config["kv_lora_rank"],),
            f"{at}.self_attn.kv_b_proj.weight": (heads * (nope + value), config["kv_lora_rank"]),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * value),
        }
        if layer < config["first_k_dense_replace"]:
            shapes |= mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        shapes |= {
            f"{at}.mlp.gate.weight": (config["n_routed_experts"], hidden),
            f"{at}.mlp.gate.e_score_correction_bias": (config["n_routed_experts"],),
        }
        for expert in [f"experts.{number}" for number in range(config["n_routed_experts"])]:
            shapes |= mlp(f"{at}.mlp.{expert}", hidden, config["moe_intermediate_size"])
        shapes |= mlp(f"{at}.mlp.shared_experts", hidden, config["moe_intermediate_size"])
    return shapes


def qwen3_moe_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (queries, hidden),
            f"{at}.self_attn.k_proj.weight": (keys, hidden),
            f"{at}.self_attn.v_proj.weight": (keys, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, queries),
            f"{at}.self_attn.q_norm.weight": (head,),
            f"{at}.self_attn.k_norm.weight": (head,),
            f"{at}.mlp.gate.weight": (config["num_experts"], hidden),
        }
        for number in range(config["num_experts"]):
            shapes |= mlp(f"{at}.mlp.experts.{number}", hidden, config["moe_intermediate_size"])
    return shapes


def mlp(at: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.gate_proj.weight": (width, hidden),
        f"{at}.up_proj.weight": (width, hidden),
        f"{at}.down_proj.weight": (hidden, width),
    }


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Values that have routers choose all experts, in bf16; norms near 1, score corrections in f32."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            found[name] = values * 0.1
        elif len(shape) == 1:
            found[name] = (1 + 0.1 * values).bfloat16()
        else:
            found[name] = (values * torch.rand(shape, generator=generator) * 0.3).bfloat16()
    return found


def is_linear(name: str) -> bool:
    """Whether publishers quantize a weight: projections of layers, and not the one before an MTP layer."""
    return "_proj" in name and "eh_proj" not in name


def fp8_blocks(
    scale_dtype: torch.dtype = torch.float32, powers_of_two: bool = False, block: int = 128
) -> Quantize:
    """e4m3 codes and `weight_scale_inv` for squares, partial ones at the edges."""

    def quantize(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scale = torch.empty(-(-rows // block), -(-columns // block), dtype=scale_dtype)
        plain = torch.empty(rows, columns, dtype=torch.bfloat16)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                one = weight[at].float().abs().max() / 448
                if powers_of_two:
                    one = torch.exp2(torch.ceil(torch.log2(one)))
                scale[i, j] = one
                codes[at] = (weight[at].float() / scale[i, j].float()).to(torch.float8_e4m3fn)
                plain[at] = (codes[at].float() * scale[i, j].float()).bfloat16()
        return {name: codes, f"{name}_scale_inv": scale}, plain

    return quantize


def write(
    folder: Path, config: dict[str, Any], plain: Tensors, quantize: Quantize, quantization: dict[str, Any]
) -> tuple[Path, Path]:
    """Write both checkpoints: `quantized`, with that entry in config.json, and `plain`, in bf16."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in plain.items():
        if is_linear(name):
            made, meant[name] = quantize(name, weight)
            stored |= made
        else:
            stored[name] = meant[name] = weight
    return write_both(folder, config, (stored, meant), quantization)


def write_both(
    folder: Path, config: dict[str, Any], contents: tuple[Tensors, Tensors], quantization: dict[str, Any]
) -> tuple[Path, Path]:
    """Write the tensors of both checkpoints: quantized and plain."""
    result = folder / "quantized", folder / "plain"
    stated: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    for place, tensors, more in zip(result, contents, (stated, {}), strict=True):
        place.mkdir(parents=True)
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more, indent=2))
        make_tokenizer(place)
    return result


def fp8_scaled(per_channel: bool, input_scale: bool) -> Quantize:
    """e4m3 codes and `weight_scale`, of each row (compressed-tensors) or of all (modelopt)."""

    def quantize(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        if not per_channel:
            scale = scale.max()
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        made = {name: codes, f"{name}_scale": scale.clone()}
        if input_scale:
            made[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
        return made, (codes.float() * scale).bfloat16()

    return quantize


def int4_groups(group: int = 16) -> Quantize:
    """compressed-tensors' pack-quantized: eight integers in a word, the first lowest, stored plus 8."""

    def quantize(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        scale = (weight.float().view(rows, -1, group).abs().amax(2) / 7).clamp(min=1e-6).bfloat16()
        each = scale.float().repeat_interleave(group, 1)
        integers = (weight.float() / each).round().clamp(-8, 7).int()
        words = torch.zeros(rows, columns // 8, dtype=torch.int64)
        for place in range(8):
            words |= (integers[:, place::8].long() + 8) << (4 * place)
        packed = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
        module = name.removesuffix(".weight")
        made = {
            f"{module}.weight_packed": packed,
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": torch.tensor([rows, columns]),
        }
        return made, (integers.float() * each).bfloat16()

    return quantize


FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(widest: int = 4) -> Quantize:
    """Bytes of two e2m1 codes, low first, and an exponent for each 32 of a row, as DeepSeek-V4 stores
    experts; exponents differ by up to `widest`.
    """

    def quantize(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(len(name) * rows + columns)
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        exponents = 120 - torch.randint(0, widest + 1, (rows, columns // 32), generator=generator)
        plain = torch.tensor(FP4_VALUES)[codes] * 2.0 ** (exponents - 127).repeat_interleave(32, 1)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        scale = exponents.to(torch.uint8)
        return {name: packed, name.replace(".weight", ".scale"): scale}, plain.bfloat16()

    return quantize


GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "sliding_window": 8,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 128,
}
GPT_OSS_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def write_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """gpt-oss as its hub has it, experts in MXFP4, and as unquantized copies have it, experts `[in, out]`."""
    config, generator = GPT_OSS, torch.Generator().manual_seed(0)
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    experts = config["num_local_experts"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    stored: Tensors = {}
    meant: Tensors = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.sinks": (config["num_attention_heads"],),
            f"{at}.mlp.router.weight": (experts, hidden),
            f"{at}.mlp.router.bias": (experts,),
            f"{at}.mlp.experts.gate_up_proj_bias": (experts, 2 * width),
            f"{at}.mlp.experts.down_proj_bias": (experts, hidden),
        }
        for leaf, rows, columns in (
            ("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries)
        ):  # fmt: skip
            shapes[f"{at}.self_attn.{leaf}_proj.weight"] = (rows, columns)
            shapes[f"{at}.self_attn.{leaf}_proj.bias"] = (rows,)
        for leaf, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            name = f"{at}.mlp.experts.{leaf}"
            codes = torch.randint(0, 16, (experts, rows, columns), generator=generator)
            exponents = torch.randint(119, 124, (experts, rows, columns // 32), generator=generator)
            stored[f"{name}_blocks"] = (
                (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).view(experts, rows, -1, 16)
            )
            stored[f"{name}_scales"] = exponents.to(torch.uint8)
            steps = 2.0 ** (exponents - 127).repeat_interleave(32, -1)
            meant[name] = (torch.tensor(FP4_VALUES)[codes] * steps).bfloat16().mT.contiguous()
    plain = random_tensors(shapes)
    return write_both(folder, config, (plain | stored, plain | meant), GPT_OSS_MXFP4)
