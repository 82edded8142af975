"""What settings accept, and what they make of it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.settings import CalibrateSettings, ExportSettings
from state.errors import InputError


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    calibrate = CalibrateSettings(model="~/model", data="~/texts/*.txt", run="~/runs/a", recipe="~/own.yaml")
    assert (calibrate.model, calibrate.data) == ("/home/ada/model", "/home/ada/texts/*.txt")
    assert (calibrate.run, calibrate.recipe) == (Path("/home/ada/runs/a"), "/home/ada/own.yaml")
    export = ExportSettings(run=Path("~/runs/a"), out="~", model="~/model", recipe=None)
    assert (export.run, export.out) == (Path("/home/ada/runs/a"), Path("/home/ada"))
    assert (export.model, export.recipe) == ("/home/ada/model", None)


def test_names_and_other_paths_stay_as_they_are() -> None:
    settings = CalibrateSettings(model="org/name~", data="name:config", run="./~a")
    assert (settings.model, settings.data, settings.run) == ("org/name~", "name:config", Path("~a"))


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(InputError, match=r"~nobody-here/a: no home .* for ~nobody-here; .* write \./~nobody"):
        CalibrateSettings(model="m", data="d", run="~nobody-here/a")


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="sample"):
        CalibrateSettings.model_validate({"model": "m", "data": "d", "run": "r", "sample": 3})
