"""A few families of the long table, through every recipe."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLICE = ("qwen3-moe", "gemma-2", "nemotron-3-nano")


def test_families_of_the_slice_are_exported_right_or_refused(tmp_path: Path) -> None:
    """In a process of its own, which forks for each command: this one may have threads."""
    arguments = [*SLICE, "--work", str(tmp_path), "--workers", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.families", *arguments], cwd=ROOT, capture_output=True, text=True
    )

    said = {name: _faults(tmp_path / f"{name}.json") for name in SLICE}
    assert said == {name: [] for name in SLICE}, ended.stdout + ended.stderr


def _faults(results: Path) -> list[str]:
    found = []
    for cell in json.loads(results.read_text())["cells"]:
        # config.json is transformers' rewriting of the source's; the long table says what is lost.
        faults = [fault for fault in cell["said"] if not fault.startswith("config.json: ")]
        if cell["verdict"] == "refused" or (cell["verdict"] == "wrong" and faults):
            found.append(f"{cell['column']}, {cell['schedule']}: {faults}")
    return found
