"""Every family of the table folded with random scales: the logits stay as they were."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.fold.families import FAMILIES
from stages.fold.folds import FoldMap, fold_norm
from stages.fold.sites import fold_map
from stages.model.text_model import TextModel
from tests.stages.fold.fold_models import (
    CONFIGS,
    load_model,
    logits,
    norm_consumers,
    read_tensors,
    save_model,
    write_tensors,
)

# How many sites of kind norm, v_to_o and up_to_down every tiny model has, and what stays unscaled in layer 1.
PLACES = {
    "llama": (4, 2, 2, set()),
    "mistral": (4, 2, 2, set()),
    "qwen2": (4, 2, 2, set()),
    "qwen3": (4, 2, 2, set()),
    "qwen3_vl": (4, 2, 2, set()),
    "qwen2_moe": (4, 2, 18, set()),
    "qwen3_moe": (4, 2, 9, set()),
    "qwen3_vl_moe": (4, 2, 16, set()),
    "glm4_moe": (4, 2, 10, set()),
    "mixtral": (4, 2, 16, set()),
    "deepseek_v3": (8, 2, 10, set()),
    "gemma": (4, 2, 2, set()),
    "gemma2": (4, 2, 2, set()),
    "gemma3_text": (4, 2, 2, set()),
    "gemma4_text": (
        6,
        0,
        18,
        {"self_attn.o_proj", "router.proj", "per_layer_input_gate", "per_layer_projection"},
    ),
    "nemotron": (4, 2, 2, set()),
    "nemotron_h": (5, 1, 10, set()),
    "qwen3_next": (4, 1, 18, set()),
    "gpt_oss": (4, 2, 0, {f"mlp.experts.{expert}.down_proj" for expert in range(8)}),
    "llama4_text": (4, 2, 6, set()),
}


def map_of(model: PreTrainedModel, tensors: dict[str, Tensor]) -> FoldMap:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return fold_map(shapes, TextModel.of(model.config), norm_consumers(model, list(tensors)))


def random_scales(folds: FoldMap) -> dict[str, Tensor]:
    """Between a quarter and four, so that one forgotten consumer shows."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.exp2(4 * torch.rand(site.channels, generator=generator) - 2)
        for name, site in folds.sites.items()
    }


def folded(
    tensors: dict[str, Tensor], folds: FoldMap, scales: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One tensor at a time, as export does it: the checkpoint in its stored dtypes, the scales in effect."""
    scales = dict(scales)
    changed = {}
    for name, site in folds.norms.items():
        changed[name], scales[site.name] = fold_norm(tensors[name], scales[site.name], site.plus_one)
    for name, tensor in tensors.items():
        part = folds.tensor_fold(name, scales)
        if part is not None:
            changed[name] = part.apply(tensor).to(tensor.dtype)
    return tensors | changed, scales


def logits_of(folder: Path, tensors: dict[str, Tensor]) -> Tensor:
    write_tensors(folder, tensors)
    return logits(load_model(folder))


def difference(changed: Tensor, reference: Tensor) -> float:
    return float((changed - reference).norm() / reference.norm())


def test_every_family_of_the_table_is_tested() -> None:
    assert {name if name in FAMILIES else f"{name}_text" for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_folding_keeps_the_logits(model_type: str, tmp_path: Path) -> None:
    model = save_model(model_type, tmp_path)
    tensors = read_tensors(tmp_path)
    folds = map_of(model, tensors)
    changed, _ = folded(tensors, folds, random_scales(folds))

    relative = difference(logits_of(tmp_path, changed), logits(model))
    print(f"{model_type}: relative difference {relative:.1e}")
    assert relative < 1e-4

    kinds = [site.kind for site in folds.sites.values()]
    unscaled = {name.split("layers.1.")[1] for name in folds.impossible if "layers.1." in name}
    norms, values, downs, impossible = PLACES[model_type]
    assert [kinds.count("norm"), kinds.count("v_to_o"), kinds.count("up_to_down")] == [norms, values, downs]
    assert unscaled == impossible


@pytest.mark.parametrize(
    "forgotten", ["mlp.gate.weight", "mlp.shared_expert_gate.weight", "mlp.shared_expert.up_proj.weight"]
)
def test_a_consumer_left_as_it_was_shows_in_the_logits(forgotten: str, tmp_path: Path) -> None:
    model = save_model("qwen3_next", tmp_path)
    tensors = read_tensors(tmp_path)
    folds = map_of(model, tensors)
    changed, _ = folded(tensors, folds, random_scales(folds))
    name = f"model.layers.1.{forgotten}"
    assert difference(logits_of(tmp_path, changed | {name: tensors[name]}), logits(model)) > 1e-2


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "nemotron_h", "gemma3_text"])
def test_adapted_statistics_are_those_of_the_folded_model(model_type: str, tmp_path: Path) -> None:
    model = save_model(model_type, tmp_path)
    tensors = read_tensors(tmp_path)
    folds = map_of(model, tensors)
    changed, scales = folded(tensors, folds, random_scales(folds))
    inputs, outputs = linear_amax(model)
    write_tensors(tmp_path, changed)
    folded_inputs, folded_outputs = linear_amax(load_model(tmp_path))

    adapted = 0
    for memory, amax in inputs.items():
        hub = memory.replace("model.", "backbone.", 1) if model_type == "nemotron_h" else memory
        factors = folds.input_factors(hub, scales)
        if factors is not None:
            amax, adapted = amax / factors, adapted + 1
        torch.testing.assert_close(folded_inputs[memory], amax, rtol=1e-4, atol=1e-6)
        if hub.endswith(".v_proj"):
            values = folds.value_factors(hub.removesuffix(".v_proj"), scales)
            assert values is not None
            torch.testing.assert_close(folded_outputs[memory], outputs[memory] / values, rtol=1e-4, atol=1e-6)
    assert adapted >= 8


def linear_amax(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Largest magnitude per channel of what every linear reads and writes."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_module: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                inputs[name] = args[0].abs().flatten(0, -2).amax(0)
                outputs[name] = output.abs().flatten(0, -2).amax(0)

            handles.append(module.register_forward_hook(hook))
    logits(model)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gemma3_text", "qwen3_next"])
def test_norms_in_bf16_lose_nothing_and_only_routers_round(model_type: str, tmp_path: Path) -> None:
    model = save_model(model_type, tmp_path)
    tensors = read_tensors(tmp_path)
    folds = map_of(model, tensors)
    unquantized = ("norm.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight", ".bias")
    stored = {
        name: tensor.bfloat16() if name.endswith(unquantized) else tensor for name, tensor in tensors.items()
    }
    reference = logits_of(tmp_path, stored)
    wished = random_scales(folds)
    rounded, snapped = folded(stored, folds, wished)

    def before_rounding(scales: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: folds.tensor_fold(name, scales) for name in stored}
        return rounded | {name: part.apply(stored[name]) for name, part in parts.items() if part is not None}

    exact = difference(logits_of(tmp_path, before_rounding(snapped)), reference)
    routers = difference(logits_of(tmp_path, rounded), reference)
    naive = difference(logits_of(tmp_path, before_rounding(wished)), reference)
    print(f"{model_type}: snapped {exact:.1e}, with routers rounded {routers:.1e}, not snapped {naive:.1e}")
    assert exact < 1e-5
    assert routers < 2e-2
    assert naive > 1e-3
