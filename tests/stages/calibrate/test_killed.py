"""Calibrations with two streams, killed in every part of a layer and finished: see kill_driver.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.calibrate.kill_driver import KINDS

ROOT = Path(__file__).parents[3]


def kills(*arguments: str) -> dict[str, int]:
    """How many of each kind were survived."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.stages.calibrate.kill_driver", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    survived: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return survived


def test_killed_once_in_each_part_of_a_layer(tmp_path: Path) -> None:
    assert kills(str(tmp_path)) == dict.fromkeys(KINDS, 1)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("more", [(), ("tuned",)], ids=["GPTQ", "tuned"])
def test_killed_everywhere(more: tuple[str, ...], tmp_path: Path) -> None:
    """With hidden states in files, where the run after the kill is killed too, and in memory."""
    survived = kills(str(tmp_path), "all", *more)
    assert survived.keys() == KINDS.keys() | ({"tuning"} if more else set())
    assert sum(survived.values()) >= 100
    if more:
        return
    assert all(survived[kind] >= 2 * count for kind, (_, count) in KINDS.items())
