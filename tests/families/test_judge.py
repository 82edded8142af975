"""The judge finds what is wrong with an export, and nothing in a right one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.families.catalogue import FAMILIES
from tests.families.checkpoint import FP4, Checkpoint
from tests.families.expected import joined, matrices, split
from tests.families.judge import Asked, Case, faults
from tests.families.layout import Fused
from tests.families.replay import Seen
from tests.families.write import write_family

KEPT = ("lm_head", "mlp.gate")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Qwen3-MoE, each of whose inputs was seen to reach 2.0."""
    family = FAMILIES["qwen3-moe"]()
    weights = write_family(family, tmp_path / "model")
    modules = [matrix.module for found in matrices(family, weights).values() for matrix in found]
    seen = Seen(dict.fromkeys(modules, 2.0), {0: 4.0, 1: 4.0}, {0: 1.0, 1: 1.0})
    return Case(family, weights, tmp_path / "model", seen)


@pytest.fixture
def export(case: Case) -> Checkpoint:
    """A right NVFP4 export of the case, rounded to nearest here."""
    tensors, exclude = {}, []
    second = max(value.float().abs().max() for value in case.weights.values()) / (6 * 448)
    for name, value in case.weights.items():
        module = name.removesuffix(".weight")
        if case.family.layout.tensors[name].kind != "linear" or module.endswith(KEPT):
            tensors[name] = value
            exclude += [module] if case.family.layout.tensors[name].kind == "linear" else []
            continue
        tensors |= _rounded(module, value, second)
    config = json.loads((case.source / "config.json").read_text())
    config["quantization_config"] = {"ignore": exclude}
    return Checkpoint(case.source, tensors, config, exclude)


def _rounded(module: str, value: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
    blocks = value.float().reshape(value.shape[0], -1, 16)
    scale = (blocks.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    scaled = blocks / (scale.float() * second)[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).flatten(1).to(torch.uint8)
    return {
        f"{module}.weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        f"{module}.weight_scale": scale,
        f"{module}.weight_scale_2": second,
        f"{module}.input_scale": torch.tensor(2.0 / (6 * 448)),
    }


def test_a_right_export_has_no_fault(case: Case, export: Checkpoint) -> None:
    assert faults(case, export, Asked()) == []


def _lose(export: Checkpoint) -> None:
    del export.tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def _lose_norm(export: Checkpoint) -> None:
    del export.tensors["model.layers.0.input_layernorm.weight"]


def _add(export: Checkpoint) -> None:
    export.tensors["model.layers.0.mlp.extra"] = torch.zeros(1)


def _change(export: Checkpoint) -> None:
    export.tensors["model.norm.weight"] = export.tensors["model.norm.weight"] + 1


def _swap(export: Checkpoint) -> None:
    for name in ("weight", "weight_scale"):
        gate, up = (f"model.layers.0.mlp.experts.0.{part}_proj.{name}" for part in ("gate", "up"))
        export.tensors[gate], export.tensors[up] = export.tensors[up], export.tensors[gate]


def _other_input(export: Checkpoint) -> None:
    export.tensors["model.layers.0.self_attn.q_proj.input_scale"] *= 1.001


def _no_input(export: Checkpoint) -> None:
    del export.tensors["model.layers.0.self_attn.q_proj.input_scale"]


def _zero_input(export: Checkpoint) -> None:
    export.tensors["model.layers.0.self_attn.q_proj.input_scale"] *= 0


def _not_excluded(export: Checkpoint) -> None:
    export.exclude.remove("lm_head")
    export.config["quantization_config"]["ignore"] = export.exclude


def _excluded(export: Checkpoint) -> None:
    export.exclude.append("model.layers.0.self_attn.q*")


def _unasked(export: Checkpoint) -> None:
    export.tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)


def _half_quantized(export: Checkpoint) -> None:
    module = "model.layers.0.self_attn.k_proj"
    export.tensors = {name: value for name, value in export.tensors.items() if not name.startswith(module)}
    export.tensors[f"{module}.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)
    export.exclude.append(module)


def _other_second_scale(export: Checkpoint) -> None:
    for name, factor in (("weight_scale_2", 2), ("weight_scale", 0.5)):
        key = f"model.layers.0.self_attn.k_proj.{name}"
        export.tensors[key] = (export.tensors[key].float() * factor).to(export.tensors[key].dtype)


def _lose_key(export: Checkpoint) -> None:
    del export.config["rope_theta"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_lose, "model.layers.1.mlp.experts.3.up_proj is missing"),
        (_lose_norm, "model.layers.0.input_layernorm.weight is missing"),
        (_add, "model.layers.0.mlp.extra is extra"),
        (_change, "model.norm.weight is not the source's"),
        (_swap, "model.layers.0.mlp.experts.0.gate_proj is off by 1."),
        (_other_input, "model.layers.0.self_attn.q_proj has the input amax 2.002"),
        (_no_input, "model.layers.0.self_attn.q_proj has no input scale"),
        (_zero_input, "model.layers.0.self_attn.q_proj has the input scale [0.0]"),
        (_not_excluded, "lm_head is unquantized and not excluded"),
        (_excluded, "model.layers.0.self_attn.q_proj is quantized and excluded by"),
        (_unasked, "model.layers.0.self_attn.k_proj.k_scale is not asked for"),
        (_half_quantized, "of model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj"),
        (_other_second_scale, "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj"),
        (_lose_key, "config.json: rope_theta was 50000.0, is None"),
    ],
)
def test_each_harm_is_found(
    case: Case, export: Checkpoint, harm: Callable[[Checkpoint], None], said: str
) -> None:
    harm(export)

    found = faults(case, export, Asked())

    assert any(fault.startswith(said) for fault in found), found


def test_missing_k_and_v_scales_are_found(case: Case, export: Checkpoint) -> None:
    assert faults(case, export, Asked(kv=True)) == [
        "layer 0 has no k_scale",
        "layer 1 has no k_scale",
        "layer 0 has no v_scale",
        "layer 1 has no v_scale",
    ]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_experts_are_put_together_again(transposed: bool, interleaved: bool) -> None:
    fused = Fused(("gate_proj", "up_proj"), "experts.{expert}.{part}", transposed, interleaved)
    value = torch.arange(3 * 4 * 6.0).reshape(3, 4, 6)

    found = {matrix.module: matrix.value for matrix in split("experts.gate_up_proj", value, fused)}

    assert sorted(found)[0] == "experts.0.gate_proj"
    assert torch.equal(joined("experts.gate_up_proj", found, fused, 3), value)


def test_experts_in_one_tensor_are_read_along_their_inputs(case: Case) -> None:
    """Two experts of 32 inputs and 2 outputs, as [expert, in, out]: codes 1.0 and 2.0, one block doubled."""
    codes = torch.tensor([0x22, 0x44], dtype=torch.uint8).expand(2, 16, 2)
    blocks = torch.ones(2, 2, 2)
    blocks[1, 1, 0] = 2.0
    tensors = {
        "x": codes,
        "x_weight_scale": blocks.to(torch.float8_e4m3fn),
        "x_weight_scale_2": torch.tensor(0.5),
    }
    values = Checkpoint(case.source, tensors, {}, []).values("x", transposed=True)
    assert values.shape == (2, 2, 32)
    assert values[0].tolist() == [[0.5] * 32, [1.0] * 32]
    assert values[1].tolist() == [[0.5] * 16 + [1.0] * 16, [1.0] * 32]
