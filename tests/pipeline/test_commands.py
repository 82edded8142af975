"""The commands that are suggested, exactly as they can be typed."""

import pytest

from pipeline.commands import calibrate_command, export_command
from stages.settings import CalibrateSettings

SETTINGS = CalibrateSettings(
    model="org/model", data="my texts/*.txt", run="runs/a", samples=64, split="test", accept_environment=True
).model_dump(mode="json")


def test_calibrate_by_holdfast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAKELEVEL", raising=False)
    assert calibrate_command(SETTINGS) == (
        "holdfast calibrate org/model 'my texts/*.txt' runs/a --split test --samples 64 --accept-environment"
    )


def test_calibrate_by_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")
    assert calibrate_command(SETTINGS) == (
        "make calibrate MODEL=org/model 'DATA=my texts/*.txt' RUN=runs/a SAMPLES=64 "
        "'ARGS=--split test --accept-environment'"
    )


def test_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAKELEVEL", raising=False)
    recipe = "general/ptq/nvfp4_experts_only-kv_fp8"
    assert (
        export_command("runs/a", recipe, recipe)
        == "holdfast export runs/a exports/a-nvfp4_experts_only-kv_fp8"
    )
    monkeypatch.setenv("MAKELEVEL", "1")
    assert export_command("runs/a", "nvfp4", "nvfp4") == "make export RUN=runs/a OUT=exports/a-nvfp4"


def test_export_names_a_recipe_that_the_run_does_not_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAKELEVEL", raising=False)
    assert export_command("runs/a", "fp8", "nvfp4") == "holdfast export runs/a exports/a-fp8 --recipe fp8"
    monkeypatch.setenv("MAKELEVEL", "1")
    assert export_command("runs/a", "fp8", "nvfp4") == "make export RUN=runs/a OUT=exports/a-fp8 RECIPE=fp8"
