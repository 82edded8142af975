"""The short form of the laboratory, by fixed seeds: a few trials of everything; long: series of commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MINUTES = 0.4  # after which no trial begins: a slow machine makes fewer


def disturb(*arguments: str) -> None:
    """Run the laboratory; nothing it finds may be wrong."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.crash", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "silent 0, foreign files touched 0, otherwise wrong none" in ran.stdout


def test_a_few_trials_of_everything() -> None:
    disturb("--short", "--seed", "11", "--minutes", str(MINUTES))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_series_of_commands() -> None:
    disturb("--part", "series", "--trials", "60", "--seed", "12", "--minutes", "15")
