"""The rescue of a calibration that modelopt's exporter refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from stages.capture import capture
from stages.export.run import export
from stages.settings import ExportSettings
from state.errors import InputError
from state.reader import open_run
from state.source import Source
from tests.stages.export import support

SCALAR_ONLY = "Only support scalar input quant amax"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    scratch = tmp_path_factory.mktemp("llama")
    model = support.make_model(scratch / "model", support.config_of("llama"))
    return model, support.make_run(scratch / "run", model, support.make_text(scratch / "text.jsonl"))


def quantize(folder: Path, run: Path, recipe: str, algorithm: str) -> PreTrainedModel:
    """modelopt's own calibration of a preset with another algorithm, on the tokens of a run."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe.presets import QUANT_CFG_CHOICES
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(open_run(run).tokens.astype(np.int64))
    with support.quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        config = {**QUANT_CFG_CHOICES[recipe], "algorithm": algorithm}
        return mtq.quantize(model, config, lambda model: [model(t, use_cache=False) for t in tokens.split(4)])


def test_the_assertion_that_lost_a_calibration_and_its_rescue(
    calibrated: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, run = calibrated
    model = quantize(folder, run, "nvfp4", "smoothquant")
    with pytest.raises(AssertionError, match=SCALAR_ONLY):
        support.exported_by_modelopt(model, tmp_path / "lost")

    rescued = capture(model, source=str(folder), run=tmp_path / "rescued", recipe="nvfp4")
    vector = open_run(rescued).amax("model.layers.0.self_attn.q_proj.input_quantizer")
    assert vector.shape == (64,)
    np.testing.assert_array_equal(
        vector, open_run(run).amax("model.layers.0.self_attn.q_proj.input_quantizer")
    )

    export(ExportSettings(run=rescued, out=tmp_path / "saved"))
    export(ExportSettings(run=run, out=tmp_path / "ours", recipe="nvfp4"))
    assert support.tensors(tmp_path / "saved") == support.tensors(tmp_path / "ours")


def test_a_captured_run_serves_other_formats(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = calibrated
    model = quantize(folder, run, "nvfp4", "max")
    rescued = capture(model, source=str(folder), run=tmp_path / "rescued", recipe="nvfp4")
    export(ExportSettings(run=rescued, out=tmp_path / "saved", recipe="fp8"))
    export(ExportSettings(run=run, out=tmp_path / "ours", recipe="fp8"))
    assert support.tensors(tmp_path / "saved") == support.tensors(tmp_path / "ours")


def test_fused_experts_share_what_modelopt_measured(tmp_path: Path) -> None:
    folder = support.make_model(tmp_path / "model", support.config_of("qwen3_moe"))
    run = support.make_run(tmp_path / "run", folder, support.make_text(tmp_path / "text.jsonl"))
    model = quantize(folder, run, "nvfp4", "max")
    rescued = capture(model, source=str(folder), run=tmp_path / "rescued", recipe="nvfp4")
    export(ExportSettings(run=rescued, out=tmp_path / "saved"))
    support.exported_by_modelopt(model, tmp_path / "theirs")
    assert support.differing(support.tensors(tmp_path / "saved"), support.tensors(tmp_path / "theirs")) == {}


def test_smoothing_is_taken_out_again(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = calibrated
    model = quantize(folder, run, "int8_smoothquant", "smoothquant")
    rescued = capture(model, source=str(folder), run=tmp_path / "rescued", recipe="nvfp4")
    name = "model.layers.1.mlp.up_proj.input_quantizer"
    np.testing.assert_array_equal(open_run(rescued).amax(name), open_run(run).amax(name))


def test_one_amax_behind_a_smoothing_scale_is_refused(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = calibrated
    model = quantize(folder, run, "int8_smoothquant", "smoothquant")
    del model.model.layers[0].self_attn.q_proj.input_quantizer._amax_for_smoothing
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.self_attn\.q_proj\.input_quantizer .*pre_quant_scale"
    ):
        capture(model, source=str(folder), run=tmp_path / "rescued", recipe="nvfp4")
    assert not (tmp_path / "rescued").exists()


def test_an_uncalibrated_model_is_refused(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = calibrated
    with pytest.raises(InputError, match="no input quantizer"):
        capture(AutoModelForCausalLM.from_pretrained(folder), str(folder), tmp_path / "rescued", "nvfp4")


def test_source_tensors_are_named_in_the_rescued_run(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = calibrated
    rescued = capture(quantize(folder, run, "fp8", "max"), str(folder), tmp_path / "rescued", "fp8")
    assert open_run(rescued).record.identity.tensors == Source.open(folder).digests(threads=1)
