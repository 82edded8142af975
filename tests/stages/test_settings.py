"""What settings accept, and what they make of it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.settings import CalibrateSettings, ExportSettings, QuantizeSettings, seconds
from state.errors import InputError


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    calibrate = CalibrateSettings(model="~/model", data="~/texts/*.txt", run="~/runs/a", recipe="~/own.yaml")
    assert (calibrate.model, calibrate.data) == ("/home/ada/model", "/home/ada/texts/*.txt")
    assert (calibrate.run, calibrate.recipe) == (Path("/home/ada/runs/a"), "/home/ada/own.yaml")
    export = ExportSettings(run=Path("~/runs/a"), out="~", model="~/model", recipe=None)
    assert (export.run, export.out) == (Path("/home/ada/runs/a"), Path("/home/ada"))
    assert (export.model, export.recipe) == ("/home/ada/model", None)


def test_quantize_is_given_what_both_stages_are() -> None:
    both = CalibrateSettings.model_fields.keys() | ExportSettings.model_fields.keys()
    assert both - QuantizeSettings.model_fields.keys() == {"partial"}  # what it exports is finished
    given = {"model": "m", "data": "d", "out": Path("exports/a"), "recipe": "fp8", "samples": 3}
    settings = QuantizeSettings(
        **given, trust_remote_code=True, fold="none", stop_after="1h", revision="main"
    )
    run = Path("exports/a-run")
    assert settings.calibration == CalibrateSettings(
        model="m", data="d", run=run, recipe="fp8", samples=3, trust_remote_code=True, stop_after="1h",
        revision="main",
    )  # fmt: skip
    assert settings.export == ExportSettings(
        run=run, out=Path("exports/a"), recipe="fp8", trust_remote_code=True, fold="none"
    )
    named = QuantizeSettings(**given, run="runs/b")
    assert named.calibration.run == named.export.run == Path("runs/b")


def test_names_and_other_paths_stay_as_they_are() -> None:
    settings = CalibrateSettings(model="org/name~", data="name:config", run="./~a")
    assert (settings.model, settings.data, settings.run) == ("org/name~", "name:config", Path("~a"))


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(InputError, match=r"~nobody-here/a: no home .* for ~nobody-here; .* write \./~nobody"):
        CalibrateSettings(model="m", data="d", run="~nobody-here/a")


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="sample"):
        CalibrateSettings.model_validate({"model": "m", "data": "d", "run": "r", "sample": 3})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("90", 90),
        ("90s", 90),
        ("0.5", 0.5),
        ("45m", 2700),
        ("3h55m", 14100),
        ("1d", 86400),
        ("1d2h3m4s", 93784),
    ],
)
def test_a_duration_is_written_as_people_write_it(written: str, meant: float) -> None:
    assert seconds(written) == meant
    settings = CalibrateSettings(model="m", data="d", run="r", stop_after=written)
    assert settings.stop_after == written


def test_a_number_is_seconds() -> None:
    assert CalibrateSettings(model="m", data="d", run="r", stop_after=90).stop_after == "90"
    assert CalibrateSettings(model="m", data="d", run="r").stop_after is None


@pytest.mark.parametrize(
    "written", ["", "0", "0s", "-5", "1w", "m", "5m3h", "1e3", "nan", "inf", "1001d", "٣"]
)
def test_what_is_no_duration_is_refused(written: str) -> None:
    with pytest.raises(ValidationError, match="a time such as 90, 90s, 45m, 3h55m or 1d is needed"):
        CalibrateSettings(model="m", data="d", run="r", stop_after=written)


def test_what_can_t_be_recorded_is_refused() -> None:
    with pytest.raises(ValidationError, match="this is not UTF-8"):
        CalibrateSettings(model="m", data="d", run=Path("runs/\udcff"))
