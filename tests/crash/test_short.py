"""The short form of the laboratory: a few trials of everything, by a fixed seed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MINUTES = 0.6  # after which no trial begins: a slow machine makes fewer


def test_a_few_trials_of_everything() -> None:
    command = ["-m", "tests.crash", "--short", "--seed", "11", "--minutes", str(MINUTES)]
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "silent 0, foreign files touched 0, otherwise wrong none" in ran.stdout
