"""The Makefile's promises: it teaches, it names what is missing, and it knows which Python it needs."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.commands import MAKE_VARIABLES, calibrate_command, quantize_command
from stages.settings import CalibrateSettings, QuantizeSettings

ROOT = Path(__file__).parent.parent.parent
VARIABLES = (
    "MODEL",
    "DATA",
    "RUN",
    "OUT",
    "RECIPE",
    "SAMPLES",
    "SEQ",
    "BATCH",
    "DEVICE",
    "ARGS",
    "MAKEFLAGS",
    "VENV",
)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Make with nothing inherited from the make that may run the tests."""
    env = {
        name: value for name, value in os.environ.items() if name not in (*VARIABLES, "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=env | environment, capture_output=True, text=True
    )


@pytest.fixture
def typed(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs make with a `holdfast` that only notes the words it is given, and gives them."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    noted = tmp_path / "words"
    for name in ("holdfast", "python"):
        (venv / "bin" / name).write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >'{noted}'\n")
        (venv / "bin" / name).chmod(0o755)
    (venv / ".holdfast-ready").touch()

    def run(*arguments: str, **environment: str) -> list[str]:
        ended = make(*arguments, f"VENV={venv}", **environment)
        assert ended.returncode == 0, ended.stderr
        return noted.read_text().split("\0")[:-1]

    return run


def test_make_alone_lists_every_target() -> None:
    listed = make().stdout
    tests = (
        "test",
        "test-newest",
        "test-oldest",
        "test-long",
        "test-families",
        "crash-test",
        "crash-test-full",
    )
    for target in (
        "help",
        "quantize",
        "calibrate",
        "export",
        "verify",
        "status",
        "check",
        "repair",
        *tests,
        "lint",
        "bench",
        "clean",
    ):
        assert f"  make {target} " in listed


def test_nothing_given_is_the_demo(typed: Callable[..., list[str]]) -> None:
    assert typed("calibrate") == [
        "calibrate", "demo/model", "demo/text.jsonl", "runs/demo", "--samples", "128", "--seq", "256",
    ]  # fmt: skip
    assert typed("export") == ["export", "runs/demo", "exports/demo-nvfp4"]
    assert typed("quantize", "RECIPE=fp8") == [
        "quantize", "demo/model", "demo/text.jsonl", "exports/demo-fp8", "--run", "runs/demo",
        "--samples", "128", "--seq", "256", "--recipe", "fp8",
    ]  # fmt: skip
    assert typed("export", "RECIPE=fp8") == ["export", "runs/demo", "exports/demo-fp8", "--recipe", "fp8"]
    assert typed("verify") == ["verify", "exports/demo-nvfp4"]
    for command in ("status", "check", "repair"):
        assert typed(command) == [command, "runs/demo"]
    assert typed("recipes") == ["recipes"]


def test_variables_reach_the_command_line(typed: Callable[..., list[str]]) -> None:
    given = ("MODEL=m", "DATA=a b", "RUN=r")
    assert typed("calibrate", *given) == ["calibrate", "m", "a b", "r"]
    more = ("RECIPE=fp8", "SAMPLES=3", "SEQ=64", "BATCH=2", "DEVICE=cpu", "ARGS=--split a --column 'b c'")
    assert typed("calibrate", *given, *more) == [
        "calibrate", "m", "a b", "r", "--samples", "3", "--seq", "64", "--batch", "2", "--device", "cpu",
        "--recipe", "fp8", "--split", "a", "--column", "b c",
    ]  # fmt: skip
    assert typed("quantize", *given, "OUT=o", *more) == [
        "quantize", "m", "a b", "o", "--run", "r", "--samples", "3", "--seq", "64", "--batch", "2",
        "--device", "cpu", "--recipe", "fp8", "--split", "a", "--column", "b c",
    ]  # fmt: skip
    assert typed("quantize", "MODEL=m", "DATA=d", "OUT=o") == ["quantize", "m", "d", "o"]
    assert typed("export", "RUN=r", "OUT=o", "MODEL=m") == ["export", "r", "o", "--model", "m"]
    assert typed("recipes", "MODEL=m", "ARGS=--json") == ["recipes", "--model", "m", "--json"]
    assert typed("verify", "OUT=o", "MODEL=m") == ["verify", "o", "--model", "m"]


AWKWARD = (
    "it's",
    'a "quoted" one',
    "$HOME $(HOME) ${HOME} $$",
    "$(",
    "`id` ; & | > * ? #1, \\",
    " spaces  around ",
    "~/runs/a",
    "größe",
)


@pytest.mark.parametrize("value", AWKWARD)
def test_any_character_reaches_the_command_line(typed: Callable[..., list[str]], value: str) -> None:
    given = {name: f"{name.lower()}{value}" for name in ("MODEL", "DATA", "RUN", "RECIPE")}
    expected = [
        "calibrate", given["MODEL"], given["DATA"], given["RUN"], "--recipe", given["RECIPE"],
    ]  # fmt: skip
    assert typed("calibrate", *(f"{name}={value}" for name, value in given.items())) == expected
    assert typed("calibrate", **given) == expected
    assert typed("export", f"RUN={value}", f"OUT=o{value}", f"MODEL={value}") == [
        "export", value.lstrip(), f"o{value}", "--model", value.lstrip(),
    ]  # fmt: skip
    for command in ("status", "check", "repair"):
        assert typed(command, f"RUN={value}") == [command, value.lstrip()]


@pytest.mark.parametrize("value", AWKWARD)
def test_a_suggested_command_brings_back_its_values(
    typed: Callable[..., list[str]], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CalibrateSettings(model=f"m{value}", data=f"d{value}", run=f"r{value}", split=f"s{value}")
    monkeypatch.setenv("MAKELEVEL", "1")
    suggested = calibrate_command(settings.model_dump(mode="json"))
    assert typed(*shlex.split(suggested)[1:]) == [
        "calibrate", f"m{value}", f"d{value}", f"r{value}", "--split", f"s{value}",
    ]  # fmt: skip
    both = QuantizeSettings(model=f"m{value}", data=f"d{value}", out=f"o{value}", run=f"r{value}")
    assert typed(*shlex.split(quantize_command(both))[1:]) == [
        "quantize", f"m{value}", f"d{value}", f"o{value}", "--run", f"r{value}",
    ]  # fmt: skip


def test_the_makefile_has_every_variable_that_is_suggested() -> None:
    assert {name.upper() for name in MAKE_VARIABLES} <= set(VARIABLES)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["calibrate", "MODEL=m", "RUN=r"], "DATA"),
        (["calibrate", "MODEL=m", "DATA=d"], "RUN"),
        (["export", "RUN=r"], "OUT"),
        (["verify", "RUN=r"], "OUT"),
        (["quantize", "MODEL=m", "DATA=d"], "OUT"),
        (["quantize", "MODEL=m", "OUT=o"], "DATA"),
        (["quantize", "RUN=r"], "OUT"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(arguments: list[str], missing: str) -> None:
    assert f"{missing} is missing. Such as:" in make("--dry-run", *arguments).stdout


def test_an_old_python_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.13\nexit 1\n')
    python.chmod(0o755)
    ended = make("status", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert ended.returncode == 2
    assert f"Holdfast needs Python 3.11 or newer, and {python} is Python 3.10.13." in ended.stderr
    assert not (tmp_path / "venv").exists()
