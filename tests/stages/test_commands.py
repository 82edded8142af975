"""The commands that are suggested, exactly as they can be typed."""

import pytest

from stages.commands import calibrate_command, export_command, quantize_command
from stages.settings import CalibrateSettings, QuantizeSettings

SETTINGS = CalibrateSettings(
    model="org/model",
    data="my texts/*.txt",
    run="runs/a",
    samples=64,
    split="test",
    accept_environment=True,
    resume="never",
).model_dump(mode="json")


@pytest.fixture
def through_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")


def test_calibrate_by_holdfast() -> None:
    assert calibrate_command(SETTINGS) == (
        "holdfast calibrate org/model 'my texts/*.txt' runs/a --split test --samples 64 --accept-environment"
    )


@pytest.mark.usefixtures("through_make")
def test_calibrate_by_make() -> None:
    assert calibrate_command(SETTINGS) == (
        "make calibrate MODEL=org/model 'DATA=my texts/*.txt' RUN=runs/a SAMPLES=64 "
        "'ARGS=--split test --accept-environment'"
    )


QUANTIZE = QuantizeSettings(
    model="org/model",
    data="my texts/*.txt",
    out="exports/a b",
    run="runs/a",
    recipe="fp8",
    stop_after="3h",
    overwrite=True,
    resume="never",
)


def test_quantize_by_holdfast() -> None:
    assert quantize_command(QUANTIZE) == (
        "holdfast quantize org/model 'my texts/*.txt' 'exports/a b' --recipe fp8 --stop-after 3h --overwrite "
        "--run runs/a"
    )
    assert quantize_command(QuantizeSettings(model="m", data="d", out="o")) == "holdfast quantize m d o"


@pytest.mark.usefixtures("through_make")
def test_quantize_by_make() -> None:
    assert quantize_command(QUANTIZE) == (
        "make quantize MODEL=org/model 'DATA=my texts/*.txt' 'OUT=exports/a b' RUN=runs/a RECIPE=fp8 "
        "'ARGS=--stop-after 3h --overwrite'"
    )


def test_a_captured_run_leaves_words_to_replace() -> None:
    captured = {"recipe": "nvfp4_awq_lite", "model": "org/model", "captured": True}
    assert calibrate_command({**captured, "run": "runs/it's"}) == (
        "holdfast calibrate org/model DATA 'runs/it'\"'\"'s' --recipe nvfp4_awq_lite"
    )


RECIPE = "general/ptq/nvfp4_experts_only-kv_fp8"


def test_export_by_holdfast() -> None:
    assert (
        export_command("runs/a", RECIPE, RECIPE)
        == "holdfast export runs/a exports/a-nvfp4_experts_only-kv_fp8"
    )
    assert export_command("runs/a", "fp8", "nvfp4") == "holdfast export runs/a exports/a-fp8 --recipe fp8"


@pytest.mark.usefixtures("through_make")
def test_export_by_make() -> None:
    assert export_command("runs/a", "nvfp4", "nvfp4") == "make export RUN=runs/a OUT=exports/a-nvfp4"
    assert export_command("runs/a", "fp8", "nvfp4") == "make export RUN=runs/a OUT=exports/a-fp8 RECIPE=fp8"
