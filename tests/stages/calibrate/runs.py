"""Calibrations of small inputs, and ways to break into them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.progress import Silent
from stages.settings import CalibrateSettings


class Crash(BaseException):
    """Stands for the process dying: nothing in the program catches it."""


class Interrupting(Silent):
    """Does something in the middle of the work: after `batches` batches."""

    def __init__(self, batches: int, action: Callable[[], object]) -> None:
        self.left, self.action = batches, action
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def advance(self, amount: int, **facts: int) -> None:
        if facts:  # a batch, not tokens being read
            self.left -= 1
            if self.left == 0:
                self.action()

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def note(self, message: str) -> None:
        self.notes.append(message)


def crash() -> None:
    raise Crash


def settings(inputs: Path, run: Path, **changes: Any) -> CalibrateSettings:
    """Windows of 32 tokens of `text.jsonl` through `model`, both in the folder `inputs`."""
    base = {"model": str(inputs / "model"), "data": str(inputs / "text.jsonl"), "run": run, "seq": 32}
    return CalibrateSettings(**(base | changes))
