"""The one name that a program imports: what it holds, and that it takes no torch."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import holdfast
from state.errors import HoldfastError
from tests.state import driver

ROOT = Path(__file__).parent.parent.parent


def test_a_run_is_read_without_torch(tmp_path: Path) -> None:
    driver.drive(tmp_path / "run")
    program = (
        "import sys, holdfast\n"
        "run = holdfast.open('run')\n"
        "assert run.amax('lm_head').shape == (2,)\n"
        "assert holdfast.CalibrateSettings(model='m', data='d', run='r').recipe == 'nvfp4'\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt')))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_every_name_is_there_and_every_error_is_one_of_them() -> None:
    assert all(hasattr(holdfast, name) for name in holdfast.__all__)
    errors = {error.__name__ for error in (HoldfastError, *_below(HoldfastError))}
    assert errors <= set(holdfast.__all__)


def _below(kind: type[HoldfastError]) -> list[type[HoldfastError]]:
    direct = [error for error in kind.__subclasses__() if error.__module__ == "state.errors"]
    return [error for one in direct for error in (one, *_below(one))]


def test_the_version_is_the_package_s() -> None:
    assert holdfast.__version__ == version("holdfast") == "0.1.0"


def test_calibrate_and_export(demo: Path, tmp_path: Path) -> None:
    settings = holdfast.CalibrateSettings(
        model=str(demo / "model"), data=str(demo / "text.jsonl"), run=tmp_path / "run", samples=4, seq=32
    )
    summary = holdfast.calibrate(settings)
    assert (summary.tokens, summary.already_finished) == (128, False)
    report = holdfast.export(holdfast.ExportSettings(run=tmp_path / "run", out=tmp_path / "out"))
    assert (report.recipe, report.shards_written) == ("nvfp4", 1)
    done = holdfast.quantize(
        holdfast.QuantizeSettings(
            model=str(demo / "model"),
            data=str(demo / "text.jsonl"),
            out=tmp_path / "fp8",
            run=tmp_path / "run",
            recipe="fp8",
            samples=4,
            seq=32,
        )
    )
    assert done.calibration is not None and done.calibration.already_finished
    assert (done.export.recipe, done.export.shards_written) == ("fp8", 1)
    amax = holdfast.open(tmp_path / "run").amax("model.layers.2.self_attn.q_proj")
    assert (amax.dtype, amax.shape) == (np.float32, (128,))


def test_capture_says_what_it_lacks(demo: Path, tmp_path: Path) -> None:
    from torch import nn

    with pytest.raises(holdfast.InputError, match="no input quantizer"):
        holdfast.capture(nn.Linear(2, 2), str(demo / "model"), tmp_path / "run", "nvfp4")


def test_python_m_holdfast_is_the_command(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "holdfast", "status", "nowhere"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, "nowhere is not a run" in ran.stderr) == (2, True)
