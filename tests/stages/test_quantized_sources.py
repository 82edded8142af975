"""A quantized source and the same weights in bf16: the same statistics, solutions and checkpoint, bit for
bit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.calibrate.run import calibrate
from stages.export.report import ExportReport
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from state.reader import open_run
from tests.stages.export.support import differing, make_text, tensors
from tests.stages.quantized_sources import (
    DEEPSEEK_V3,
    QWEN3_MOE,
    deepseek_v3_shapes,
    fp8_blocks,
    qwen3_moe_shapes,
    random_tensors,
    write,
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
    outs = folder / f"{recipe}-quantized", folder / f"{recipe}-plain"
    reports = [
        export(ExportSettings(run=run, out=out, recipe=recipe)) for run, out in zip(runs, outs, strict=True)
    ]
    assert differing(tensors(outs[0]), tensors(outs[1])) == {}
    for name in ("config.json", "hf_quant_config.json"):
        assert (outs[0] / name).read_text() == (outs[1] / name).read_text()
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
