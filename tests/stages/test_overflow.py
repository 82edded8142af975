"""A float16 model that overflows: named as it happens, never solved, and well in bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from state.errors import IdentityMismatch, InputError
from state.reader import open_run
from tests.families.dense import llama
from tests.families.tokenizer import write_text
from tests.families.write import write_family

GPTQ = "general/ptq/nvfp4_default-kv_none-gptq"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In layer 1 the product of gate and up leaves float16, and no weight does."""
    folder = tmp_path_factory.mktemp("overflow")
    weights = {name: value.half() for name, value in write_family(llama(), folder / "model").items()}
    for leaf in ("gate_proj", "up_proj"):
        weights[f"model.layers.1.mlp.{leaf}.weight"] *= 1000
    save_file(weights, folder / "model" / "model.safetensors")
    config = json.loads((folder / "model" / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "model" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    write_text(folder / "text.jsonl")
    return folder


def settings(inputs: Path, run: Path, **more: Any) -> CalibrateSettings:
    model, data = str(inputs / "model"), str(inputs / "text.jsonl")
    return CalibrateSettings(model=model, data=data, run=run, samples=8, seq=32, batch=4, **more)


@pytest.mark.parametrize(
    ("schedule", "recipe"),
    [("whole", "fp8"), ("layerwise", "fp8"), ("auto", "nvfp4_awq_full"), ("auto", GPTQ)],
)
def test_the_first_site_is_named(inputs: Path, tmp_path: Path, schedule: str, recipe: str) -> None:
    run = tmp_path / "run"
    named = (
        r"model\.layers\.1\.mlp\.down_proj \(input\) saw inf or NaN in layer 1, computed in float16: .* "
        rf"Give another RUN: holdfast calibrate \S+ \S+ {run}-bfloat16 .*--dtype bfloat16"
    )
    with pytest.raises(InputError, match=named):
        calibrate(settings(inputs, run, schedule=schedule, recipe=recipe), Silent())
    assert not open_run(run).head.finished
    with pytest.raises(IdentityMismatch, match=r"config\.dtype: stored \"float16\", now \"bfloat16\""):
        calibrate(settings(inputs, run, schedule=schedule, recipe=recipe, dtype="bfloat16"), Silent())


def test_in_bfloat16_it_is_well(inputs: Path, tmp_path: Path) -> None:
    """And equals the same checkpoint with its tensors cast beforehand."""
    calibrate(settings(inputs, tmp_path / "run", dtype="bfloat16", recipe="nvfp4_awq_full"), Silent())
    export(ExportSettings(run=tmp_path / "run", out=tmp_path / "out", recipe="nvfp4_awq_full"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (inputs / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    stored = load_file(inputs / "model" / "model.safetensors")
    save_file({name: value.bfloat16() for name, value in stored.items()}, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(config))
    cast = settings(inputs, tmp_path / "run2", recipe="nvfp4_awq_full").model_copy(
        update={"model": str(copy)}
    )
    calibrate(cast, Silent())
    export(ExportSettings(run=tmp_path / "run2", out=tmp_path / "out2", recipe="nvfp4_awq_full"))
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    dtypes = {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()}
    assert torch.bfloat16 in dtypes and torch.float16 not in dtypes
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_wider_than_stored_by_every_schedule(inputs: Path, tmp_path: Path) -> None:
    for schedule in ("whole", "layerwise"):
        calibrate(settings(inputs, tmp_path / schedule, schedule=schedule, dtype="float32"), Silent())
    whole, layers = (open_run(tmp_path / name).generation().arrays for name in ("whole", "layerwise"))
    assert all(values.tobytes() == layers[key].tobytes() for key, values in whole.items())
    assert open_run(tmp_path / "whole").record.environment.dtype == "float32"
