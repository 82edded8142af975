"""Gemma 4 as its hub stores it, with its tower and fused experts, killed in a layer and gone on with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from state.head import Head
from state.reader import open_run
from state.store import RunWriter
from state.update import Update
from tests.families.gemma4 import gemma4_moe
from tests.families.tokenizer import write_text
from tests.families.write import write_family
from tests.stages.export.support import differing, tensors


class Crash(BaseException):
    """Stands in for the end of the process."""


def settings(folder: Path, run: str) -> CalibrateSettings:
    return CalibrateSettings(
        model=str(folder / "model"),
        data=str(folder / "text.jsonl"),
        run=folder / run,
        samples=8,
        seq=32,
        batch=4,
        recipe="nvfp4_awq_full",
    )


def test_awq_of_gemma_4_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text.jsonl")
    write_family(gemma4_moe(), tmp_path / "model")
    calibrate(settings(tmp_path, "undisturbed"), Silent())

    def commit(writer: RunWriter, update: Update) -> Head:
        if update.cursor.layer == 2:
            raise Crash
        return whole_commit(writer, update)

    whole_commit = RunWriter.commit
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(RunWriter, "commit", commit)
        calibrate(settings(tmp_path, "run"), Silent())
    assert open_run(tmp_path / "run").head.cursor.layer == 1
    calibrate(settings(tmp_path, "run"), Silent())

    heads = [open_run(tmp_path / run).head for run in ("undisturbed", "run")]
    solutions = [
        {path: seen for path, seen in head.objects.items() if "/solutions/" in path} for head in heads
    ]
    assert solutions[0] == solutions[1] and len(solutions[0]) > 10
    for run in ("undisturbed", "run"):
        asked = ExportSettings(run=tmp_path / run, out=tmp_path / f"{run}-out", recipe="nvfp4_awq_full")
        export(asked, Silent())
    assert differing(tensors(tmp_path / "undisturbed-out"), tensors(tmp_path / "run-out")) == {}
    found = load_file(tmp_path / "run-out" / "model.safetensors")
    experts = [name for name in found if name.endswith(".experts.0.down_proj.weight")]
    assert experts and all(found[name].dtype == torch.uint8 for name in experts)
    assert any(name.startswith("model.vision_tower.") for name in found)
