"""The Makefile's promises: it teaches, it names what is missing, and it knows which Python it needs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Make with nothing inherited from the make that may run the tests."""
    env = {
        name: value for name, value in os.environ.items() if name not in (*VARIABLES, "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def last_command(*arguments: str) -> list[str]:
    """What make would run last, in words."""
    shown = make("--dry-run", *arguments).stdout.replace("\\\n", " ").splitlines()
    return shown[-1].split()


def test_make_alone_lists_every_target() -> None:
    listed = make().stdout
    for target in (
        "help", "calibrate", "export", "status", "test", "test-newest", "test-oldest", "lint", "crash-test",
        "bench", "clean",
    ):  # fmt: skip
        assert f"  make {target} " in listed


def test_nothing_given_is_the_demo() -> None:
    assert last_command("calibrate")[1:] == [
        "calibrate", "'demo/model'", "'demo/text.jsonl'", "'runs/demo'",
        "--samples", "128", "--seq", "256", "--batch", "8", "--device", "auto",
    ]  # fmt: skip
    assert last_command("export")[1:] == ["export", "'runs/demo'", "'exports/demo-nvfp4'"]
    assert last_command("export", "RECIPE=fp8")[1:] == [
        "export",
        "'runs/demo'",
        "'exports/demo-fp8'",
        "--recipe",
        "'fp8'",
    ]
    assert last_command("status")[1:] == ["status", "'runs/demo'"]


def test_variables_reach_the_command_line() -> None:
    given = ("MODEL=m", "DATA=a b", "RUN=r", "RECIPE=fp8", "BATCH=2", "ARGS=--experts eager")
    assert " ".join(last_command("calibrate", *given)[1:]) == (
        "calibrate 'm' 'a b' 'r' --samples 512 --seq 2048 "
        "--batch 2 --device auto --recipe 'fp8' --experts eager"
    )
    assert " ".join(last_command("export", "RUN=r", "OUT=o", "MODEL=m")[1:]) == "export 'r' 'o' --model 'm'"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["calibrate", "MODEL=m", "RUN=r"], "DATA"),
        (["calibrate", "MODEL=m", "DATA=d"], "RUN"),
        (["export", "RUN=r"], "OUT"),
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
