"""One file and one row are all that a format takes: calibrate with GPTQ, export and dequantize a toy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.formats import TABLE
from stages.progress import Silent
from stages.settings import ExportSettings
from tests.stages.calibrate.runs import settings
from tests.stages.export.support import config_of, make_model, make_text
from tests.stages.formats.toy import TOY

RECIPE = """\
metadata:
  recipe_type: ptq
quantize:
  algorithm: gptq
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*layers*weight_quantizer', cfg: {num_bits: 8, axis: 0}}
    - {quantizer_name: '*mlp.gate.*', enable: false}
"""


@pytest.mark.parametrize("recipe", ["int8_weight_only", "gptq"])
def test_a_format_is_one_file(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, TOY.name, TOY)
    make_model(tmp_path / "model", config_of("qwen3_moe"))
    make_text(tmp_path / "text.jsonl")
    if recipe == "gptq":
        (tmp_path / "gptq.yaml").write_text(RECIPE)
        recipe = str(tmp_path / "gptq.yaml")
    run, out = tmp_path / "run", tmp_path / "out"
    calibrate(settings(tmp_path, run, recipe=recipe, samples=16), Silent())
    report = export(ExportSettings(run=run, out=out))
    assert list(report.formats) == ["int8_wo"]

    source, made = load_file(tmp_path / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    scaled = [name.removesuffix(".weight_scale") for name in made if name.endswith(".weight_scale")]
    assert len(scaled) == report.formats["int8_wo"] > 0
    for module in scaled:
        weight = source[f"{module}.weight"].float()
        stored = {leaf: made[f"{module}.{leaf}"] for leaf in ("weight", "weight_scale")}
        assert stored["weight"].dtype == torch.int8
        assert stored["weight_scale"].log2().frac().eq(0).all()
        steps = (TOY.dequantize(stored) - weight).abs() / stored["weight_scale"][:, None]
        nearest = bool((steps <= 0.5).all())
        # GPTQ moves columns to make up for the error of those before.
        assert nearest == (report.solver is None)
        assert steps.max() < 8
