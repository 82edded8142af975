"""Tiny random models of every family that can be folded, and the norm consumers of such a model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from stages.model.tensor_map import map_tensors
from state.layout import Relation
from state.names import split_name

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
GROUPED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
QWEN3_VL = TEXT | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
}
QWEN3_NEXT = {
    "num_experts": 8,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    "num_hidden_layers": 4,
    "use_mamba_kernels": False,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "moe_shared_expert_intermediate_size": 24,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": TEXT | {"attention_bias": True, "mlp_bias": True},
    "mistral": TEXT,
    "qwen2": TEXT,
    "qwen3": TEXT,
    "qwen3_vl": {"text_config": QWEN3_VL, "vision_config": VISION, "tie_word_embeddings": False},
    "qwen2_moe": TEXT | MOE | {"num_experts": 8, "shared_expert_intermediate_size": 24},
    "qwen3_moe": TEXT | MOE | {"num_experts": 8, "mlp_only_layers": [0]},
    "qwen3_vl_moe": {
        "text_config": QWEN3_VL | MOE | {"num_experts": 8},
        "vision_config": VISION,
        "tie_word_embeddings": False,
    },
    "glm4_moe": TEXT | MOE | GROUPED | {"attention_bias": True, "use_qk_norm": True},
    "mixtral": TEXT | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": TEXT | MOE | MLA | GROUPED,
    "gemma": TEXT | {"tie_word_embeddings": True},
    "gemma2": TEXT | SLIDING | {"tie_word_embeddings": True},
    "gemma3_text": TEXT | SLIDING | {"tie_word_embeddings": True},
    "gemma4_text": TEXT
    | SLIDING
    | {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "tie_word_embeddings": True,
    },
    "nemotron": TEXT,
    "nemotron_h": TEXT | MOE | NEMOTRON_H,
    "qwen3_next": TEXT | MOE | QWEN3_NEXT,
    "gpt_oss": TEXT | SLIDING | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "llama4_text": TEXT
    | {
        "num_local_experts": 4,
        "intermediate_size_mlp": 40,
        "moe_layers": [1],
        "attn_temperature_tuning": False,
    },
}


def save_model(model_type: str, folder: Path) -> PreTrainedModel:
    """A random float32 model of this type, norms included, written to `folder` as a checkpoint."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], dtype=torch.float32)
    kind = AutoModelForImageTextToText if "text_config" in CONFIGS[model_type] else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter += 0.4 * torch.rand_like(parameter) - 0.2
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return load_model(folder)


def load_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output: Tensor = model(input_ids=tokens, use_cache=False).logits
    return output


def norm_consumers(model: PreTrainedModel, names: list[str]) -> tuple[Relation, ...]:
    """What calibration finds: the linears and experts modules that a norm's output (its storage) reaches."""
    hub: dict[str, list[str]] = defaultdict(list)
    for tensor, (parameter, _) in map_tensors(model, names).items():
        hub[parameter].append(tensor)
    kept: list[Tensor] = []
    norms: dict[int, str] = {}
    readers: dict[str, list[str]] = defaultdict(list)

    def norm_hook(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            kept.append(output)
            norms[output.untyped_storage().data_ptr()] = name

        return hook

    def reader_hook(modules: list[str]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0])
            norm = norms.get(inputs[0].untyped_storage().data_ptr())
            if norm is not None:
                readers[norm] += modules

        return hook

    handles = []
    for name, module in model.named_modules():
        first = next(
            (leaf for leaf in ("gate_up_proj", "up_proj", "weight") if f"{name}.{leaf}" in hub), None
        )
        if first is None:
            continue
        tensors = hub[f"{name}.{first}"]
        if "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(norm_hook(tensors[0].removesuffix(".weight"))))
        elif isinstance(module, nn.Linear) or first != "weight":
            handles.append(module.register_forward_pre_hook(reader_hook(_hub_modules(tensors))))
    logits(model)
    for handle in handles:
        handle.remove()

    layers: dict[tuple[str, tuple[str, ...]], set[int]] = defaultdict(set)
    for norm, modules in readers.items():
        pattern, layer, _ = split_name(norm)
        members = tuple(dict.fromkeys(split_name(module)[0] for module in modules))
        layers[pattern, members] |= set() if layer is None else {layer}
    return tuple(
        Relation(kind="norm_consumers", norm=norm, members=members, layers=tuple(sorted(held)))
        for (norm, members), held in layers.items()
    )


def _hub_modules(tensors: list[str]) -> list[str]:
    if tensors[0].endswith(".gate_up_proj"):
        experts = tensors[0].removesuffix(".gate_up_proj")
        return [f"{experts}.0.gate_proj", f"{experts}.0.up_proj"]
    return [tensor.removesuffix(".weight") for tensor in tensors]
