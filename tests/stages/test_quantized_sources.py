"""A quantized source and the same weights in bf16: the same statistics, solutions and checkpoint, bit for
bit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.calibrate.run import calibrate
from stages.export.report import ExportReport
from stages.export.run import export
from stages.formats import NVFP4
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from state.errors import IdentityMismatch, InputError
from state.reader import open_run
from tests.stages.export.support import differing, make_text, tensors
from tests.stages.quantized_sources import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    Quantize,
    deepseek_v3_shapes,
    fp8_blocks,
    fp8_scaled,
    int4_groups,
    mxfp4,
    qwen3_moe_shapes,
    random_tensors,
    write,
    write_gpt_oss,
)

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def deepseek_v3(folder: Path) -> tuple[Path, Path]:
    return write(folder, DEEPSEEK_V3, random_tensors(deepseek_v3_shapes(DEEPSEEK_V3)), fp8_blocks(), FP8)


def qwen3_moe(folder: Path) -> tuple[Path, Path]:
    left = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    stated = FP8 | {"modules_to_not_convert": ["lm_head", *left]}
    weights = random_tensors(qwen3_moe_shapes(QWEN3_MOE))
    return write(folder, QWEN3_MOE, weights, fp8_blocks(torch.bfloat16), stated)


def run_both(folder: Path, models: tuple[Path, Path], **settings: Any) -> tuple[Path, Path]:
    """Calibrate both into `run-quantized` and `run-plain`."""
    data = make_text(folder / "text.jsonl")
    runs = folder / "run-quantized", folder / "run-plain"
    for model, run in zip(models, runs, strict=True):
        given = {"model": str(model), "data": str(data), "run": run, "samples": 8, "seq": 32, "batch": 4}
        calibrate(CalibrateSettings(**(given | settings)), Silent())
    return runs


def require_same_measured(runs: tuple[Path, Path]) -> None:
    one, other = (open_run(run).generation().arrays for run in runs)
    assert one.keys() == other.keys() and len(one) > 20
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def require_same_solved(runs: tuple[Path, Path]) -> int:
    """Returns how many arrays of solutions there are."""
    digests = [
        {path: seen for path, seen in open_run(run).head.objects.items() if "/solutions/" in path}
        for run in runs
    ]
    assert digests[0] == digests[1]
    return len(digests[0])


def export_both(folder: Path, runs: tuple[Path, Path], recipe: str) -> tuple[Path, ExportReport]:
    """The checkpoint of the quantized source, after it was compared with that of the plain one."""
    name = Path(recipe).stem
    outs = folder / f"{name}-quantized", folder / f"{name}-plain"
    reports = [
        export(ExportSettings(run=run, out=out, recipe=recipe)) for run, out in zip(runs, outs, strict=True)
    ]
    assert differing(tensors(outs[0]), tensors(outs[1])) == {}
    for file in ("config.json", "hf_quant_config.json"):
        assert (outs[0] / file).read_text() == (outs[1] / file).read_text()
    assert reports[1].dequantized == {}
    return outs[0], reports[0]


@pytest.mark.parametrize("schedule", ["whole", "layerwise"])
@pytest.mark.parametrize("family", [deepseek_v3, qwen3_moe])
def test_fp8_in_blocks(family: Any, schedule: str, tmp_path: Path) -> None:
    models = family(tmp_path)
    runs = run_both(tmp_path, models, schedule=schedule)
    require_same_measured(runs)
    count = sum(name.endswith("_scale_inv") for name in load_file(models[0] / "model.safetensors"))
    for recipe in ("nvfp4", "fp8"):
        out, report = export_both(tmp_path, runs, recipe)
        assert report.dequantized == {"FP8 in blocks of 128 x 128": count}
        assert json.loads((out / "export_report.json").read_text())["dequantized"] == report.dequantized
        assert (
            json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
        )
        assert not any(name.endswith("_scale_inv") for name in tensors(out))


def test_fp8_in_blocks_solved(tmp_path: Path) -> None:
    runs = run_both(tmp_path, deepseek_v3(tmp_path), recipe="nvfp4_awq_full")
    require_same_measured(runs)
    assert require_same_solved(runs) > 10
    export_both(tmp_path, runs, "nvfp4_awq_full")


def test_what_stays_unquantized_is_dequantized(tmp_path: Path) -> None:
    """The layers for multi-token prediction, which the class never builds, and what a recipe leaves alone."""
    models = deepseek_v3(tmp_path)
    runs = run_both(tmp_path, models)
    out, _ = export_both(tmp_path, runs, "general/ptq/nvfp4_experts_only-kv_fp8")
    found, meant = load_file(out / "model.safetensors"), load_file(models[1] / "model.safetensors")
    for name in ("model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert found[name].dtype == torch.bfloat16 and found[name].equal(meant[name])


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


SCHEMES: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "FP8 per channel": (fp8_scaled(True, False), compressed(num_bits=8, type="float", strategy="channel")),
    "FP8 per tensor": (fp8_scaled(False, True), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "INT4 in groups of 16": (
        int4_groups(),
        compressed(num_bits=4, type="int", strategy="group", group_size=16),
    ),
    "FP4 in groups of 32": (mxfp4(), {}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_schemes(scheme: str, tmp_path: Path) -> None:
    quantize, stated = SCHEMES[scheme]
    config = QWEN3_MOE | {"moe_intermediate_size": 96}
    models = write(tmp_path, config, random_tensors(qwen3_moe_shapes(config)), quantize, stated)
    runs = run_both(tmp_path, models)
    require_same_measured(runs)
    _, report = export_both(tmp_path, runs, "nvfp4")
    assert report.dequantized == {scheme: 32}


class TestMxfp4Cast:
    """Against modelopt's lossless cast, gate and up of an expert sharing their largest exponent."""

    def made(self, folder: Path, widest: int) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
        config = QWEN3_MOE | {"moe_intermediate_size": 96}
        models = write(folder, config, random_tensors(qwen3_moe_shapes(config)), mxfp4(widest), {})
        return models, run_both(folder, models)

    @pytest.mark.parametrize("widest", [4, 30])
    def test_is_modelopts(self, widest: int, tmp_path: Path) -> None:
        from modelopt.torch.export.shard_cast_utils import mxfp4_kmax, quantize_mxfp4_to_nvfp4_lossless

        models, runs = self.made(tmp_path, widest)
        out = tmp_path / "out"
        report = export(ExportSettings(run=runs[0], out=out, recipe="nvfp4", mxfp4_scale="cast"))
        stored, found = load_file(models[0] / "model.safetensors"), load_file(out / "model.safetensors")
        meant = load_file(models[1] / "model.safetensors")
        lost, total = 0, 0
        for group in (("gate_proj", "up_proj"), ("down_proj",)):
            for layer in range(2):
                for expert in range(4):
                    at = [f"model.layers.{layer}.mlp.experts.{expert}.{leaf}" for leaf in group]
                    largest = max(mxfp4_kmax(stored[f"{module}.scale"]) for module in at)
                    for module in at:
                        weight, scale, tensor_scale, groups, held = quantize_mxfp4_to_nvfp4_lossless(
                            stored[f"{module}.weight"], stored[f"{module}.scale"], largest, "cpu"
                        )
                        assert found[f"{module}.weight"].equal(weight)
                        assert (
                            found[f"{module}.weight_scale"].view(torch.uint8).equal(scale.view(torch.uint8))
                        )
                        assert found[f"{module}.weight_scale_2"].equal(tensor_scale)
                        lost, total = lost + groups - held, total + groups
                        if groups == held:
                            kept = {
                                leaf: found[f"{module}.{leaf}"]
                                for leaf in ("weight", "weight_scale", "weight_scale_2")
                            }
                            assert NVFP4.dequantize(kept).bfloat16().equal(meant[f"{module}.weight"])
        assert (lost == 0) == (widest == 4)
        (use,) = [use for use in report.policies if use.policy == "mxfp4_scale=cast"]
        assert len(use.quantizers) == 32
        attention = 2 * 160 * (128 + 64 + 64 + 128) // 32
        if widest == 4:
            assert use.detail == (
                f"scales of the source were kept; 0 of {total + attention:,} groups of 32 values do not fit "
                "them"
            )

    def test_max_is_another_result(self, tmp_path: Path) -> None:
        _, runs = self.made(tmp_path, 4)
        for name, settings in (("cast", {"mxfp4_scale": "cast"}), ("max", {})):
            export(ExportSettings(run=runs[0], out=tmp_path / name, recipe="nvfp4", **settings))
        assert differing(tensors(tmp_path / "cast"), tensors(tmp_path / "max"))
        with pytest.raises(IdentityMismatch, match="mxfp4_scale"):
            export(ExportSettings(run=runs[0], out=tmp_path / "cast", recipe="nvfp4"))

    def test_without_mxfp4_or_nvfp4_it_is_refused(self, tmp_path: Path) -> None:
        _, runs = self.made(tmp_path, 4)
        for run, recipe, words in (
            (runs[1], "nvfp4", "has nothing to act on"),
            (runs[0], "fp8", "has nothing to act on"),
            (runs[0], "int8_smoothquant", "changes by smoothquant"),
        ):
            with pytest.raises(InputError, match=words):
                export(ExportSettings(run=run, out=tmp_path / "out", recipe=recipe, mxfp4_scale="cast"))
        assert not (tmp_path / "out").exists()


ATTENTION = """
imports:
  base_disable_all: configs/ptq/units/base_disable_all
  nvfp4: configs/numerics/nvfp4
metadata:
  recipe_type: ptq
quantize:
  algorithm: max
  quant_cfg:
    - $import: base_disable_all
    - quantizer_name: '*self_attn*weight_quantizer'
      cfg: {$import: nvfp4}
    - quantizer_name: '*self_attn*input_quantizer'
      cfg: {$import: nvfp4}
"""


@pytest.mark.parametrize("schedule", ["whole", "layerwise"])
def test_mxfp4_experts_of_gpt_oss(schedule: str, tmp_path: Path) -> None:
    """Experts are observed, and where a recipe leaves them alone, stored as unquantized copies have them."""
    (tmp_path / "attention.yaml").write_text(ATTENTION)
    recipe = str(tmp_path / "attention.yaml")
    models = write_gpt_oss(tmp_path)
    runs = run_both(tmp_path, models, schedule=schedule, recipe=recipe)
    require_same_measured(runs)
    assert any(".experts.E.down_proj" in name for name in open_run(runs[0]).generation().arrays)
    out, report = export_both(tmp_path, runs, recipe)
    assert report.dequantized == {"FP4 in groups of 32": 4} and report.formats == {"nvfp4": 8}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found, meant = load_file(out / "model.safetensors"), load_file(models[1] / "model.safetensors")
    assert found[name].equal(meant[name]) and not any(key.endswith(("_blocks", "_scales")) for key in found)


@pytest.mark.parametrize("recipe", ["nvfp4_awq_full", "general/ptq/nvfp4_default-kv_none-gptq"])
def test_mxfp4_experts_solved(recipe: str, tmp_path: Path) -> None:
    runs = run_both(tmp_path, write_gpt_oss(tmp_path), recipe=recipe)
    require_same_measured(runs)
    assert require_same_solved(runs) > 10
    out, _ = export_both(tmp_path, runs, recipe)
    found = load_file(out / "model.safetensors")
    assert found["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.uint8


def bare_codes(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return {name: weight.to(torch.float8_e4m3fn)}, weight


class TestRefusedBeforeAnyWork:
    def refuse(self, folder: Path, model: Path, words: str) -> None:
        data, run = make_text(folder / "text.jsonl"), folder / "run"
        with pytest.raises(InputError, match=words):
            calibrate(
                CalibrateSettings(model=str(model), data=str(data), run=run, samples=8, seq=32), Silent()
            )
        assert not run.exists()

    def test_fp8_without_scales(self, tmp_path: Path) -> None:
        """With and without quantization_config: bare codes would be taken for numbers."""
        for number, stated in enumerate((FP8, {})):
            weights = random_tensors(qwen3_moe_shapes(QWEN3_MOE))
            model, _ = write(tmp_path / str(number), QWEN3_MOE, weights, bare_codes, stated)
            words = r"0\.down_proj\.weight is F8_E4M3\[160, 144\], and it has no scale beside it"
            self.refuse(tmp_path, model, words)

    def test_a_method_that_cannot_be_read(self, tmp_path: Path) -> None:
        stated = {"quant_method": "gptq", "bits": 4}
        weights = random_tensors(qwen3_moe_shapes(QWEN3_MOE))
        model, _ = write(tmp_path, QWEN3_MOE, weights, fp8_blocks(), stated)
        self.refuse(tmp_path, model, r"config\.json says .* quant_method 'gptq' can't be read here")


def test_fp8_without_quantization_config_is_dequantized_all_the_same(tmp_path: Path) -> None:
    models = write(tmp_path, QWEN3_MOE, random_tensors(qwen3_moe_shapes(QWEN3_MOE)), fp8_blocks(), {})
    runs = run_both(tmp_path, models)
    require_same_measured(runs)
    export_both(tmp_path, runs, "fp8")


def test_a_scale_that_differs_is_another_model(tmp_path: Path) -> None:
    models = qwen3_moe(tmp_path)
    runs = run_both(tmp_path, models)
    stored = load_file(models[0] / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    stored[name] = stored[name] * 2
    save_file(stored, models[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(IdentityMismatch, match=rf"tensors\.{name}: stored BF16\[2,2\]"):
        export(ExportSettings(run=runs[0], out=tmp_path / "out", recipe="nvfp4"))
