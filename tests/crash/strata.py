"""What kind of operation one is: many differ in a number alone; one of each kind stands for the others."""

import re
from collections import Counter
from pathlib import Path

from tests.crash.interposer import Seen

NUMBERS = re.compile(r"\d+")
STATISTICS = re.compile(r"calibration\.zarr/gN/[a-z_]+/.+?(/c(\.N)*|/zarr\.json)?$")
SOLUTIONS = re.compile(r"calibration\.zarr/solutions/[^/]+/N/.+?(/c(\.N)*|/zarr\.json)?$")
PLANS = re.compile(r"(run/plans/).+?(\.tmp)?$")


def kind_of_file(path: str, trial: Path) -> str:
    """A path without what varies among files of one kind: numbers, and the names of arrays."""
    try:
        name = Path(path).relative_to(trial).as_posix()
    except ValueError:
        return f"source/{Path(path).name}"
    name = NUMBERS.sub("N", name.removesuffix(" (deleted)"))
    if match := STATISTICS.search(name):
        return f"run/calibration.zarr/gN/STATISTIC{_part(match[1])}"
    if match := SOLUTIONS.search(name):
        return f"run/calibration.zarr/solutions/SOLVER/N{_part(match[1])}"
    if match := PLANS.search(name):
        return f"{match[1]}PLAN{match[2] or ''}"
    return name


def _part(found: str | None) -> str:
    return "" if found is None else "/zarr.json" if found.endswith("json") else "/chunk"


def stratum_of(seen: Seen, trial: Path) -> str:
    """`operation | kind of file | function`: what the operation has in common with others of its kind."""
    return f"{seen.operation} | {kind_of_file(seen.path, trial)} | {seen.phase}"


class Census:
    """A watcher that counts the operations of each stratum, and does nothing else."""

    def __init__(self, trial: Path) -> None:
        self._trial = trial
        self.counts: Counter[str] = Counter()

    def before(self, seen: Seen, half: object) -> None:
        self.counts[stratum_of(seen, self._trial)] += 1

    def after(self, seen: Seen) -> None:
        pass
