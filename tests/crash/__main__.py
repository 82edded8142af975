"""The crash laboratory: disturbs calibrate, export and repair at every kind of file operation, gives the same
command again and compares every byte.

`make crash-test` takes a stratified sample within half an hour; `make crash-test-full` all of it.
"""

import os

# CUDA can't be begun again in a fork, and every command here is one.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES=""
)

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.crash import damage, device, machine, twice
from tests.crash.bits import STATES as BIT_STATES
from tests.crash.commands import SCENARIOS
from tests.crash.parts import DAMAGE_STATES, bits, cuts, damages, operations, series, situations
from tests.crash.prepare import prepare
from tests.crash.report import table, write_json
from tests.crash.world import files_of

MEMORY = Path("/dev/shm")
PARTS = {
    "twice": situations,
    "cuts": cuts,
    "bits": bits,
    "series": series,
    "damage": damages,
    "operations": operations,
}
"""In this order: the last one takes what is left of the time."""
SAMPLE = {"damage": 400, "series": 20}
FULL = {"series": 100}
SHORT = {"twice": 2, "cuts": 0, "bits": 10, "series": 1, "damage": 6, "operations": 16}
"""The most trials of a part; what is not here has no limit."""
SHORT_SCENARIOS = ["calibrate", "second pass", "resume", "repair", "export", "export overwriting"]
NEEDS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "operations": ((), ()),
    "damage": ([state.scenario for state in damage.STATES], DAMAGE_STATES),
    "twice": (twice.NEEDS, twice.STATES),
    "cuts": (device.CUT, ()),
    "series": (machine.NEEDS, ()),
    "bits": ((), BIT_STATES),
}
"""For each part the scenarios whose ends it compares with, and the states it begins from."""


def main() -> int:
    """Run what the arguments ask for. Returns the exit code."""
    given = arguments()
    print(f"seed {given.seed} (--seed={given.seed} draws the same trials)", flush=True)
    where = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="holdfast-crash-", dir=where))
    scenarios = given.scenarios if "operations" in given.parts else []
    scenarios = [*scenarios, *(name for part in given.parts for name in NEEDS[part][0])]
    states = [name for part in given.parts for name in NEEDS[part][1]]
    prepared = prepare(folder / "lab", list(dict.fromkeys(scenarios)), list(dict.fromkeys(states)))
    source = files_of(prepared.laboratory.source)
    until = time.monotonic() + given.minutes * 60
    parts = [PARTS[name](prepared, given, until) for name in given.parts]
    if files_of(prepared.laboratory.source) != source:
        parts[0].results.append(touched_source())
    print(table(parts))
    if given.json:
        write_json(given.json, given.seed, parts)
    if any(part.wrong for part in parts):
        print(f"what went wrong is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--full", action="store_true", help="every stratum with every fault")
    parser.add_argument("--more", type=int, default=1000, help="with --full: trials beyond one each")
    parser.add_argument("--trials", type=int, help="at most so many of each part")
    parser.add_argument("--short", action="store_true", help="a few of everything, within a minute")
    parser.add_argument("--steps", type=int, default=12, help="steps of a series")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time")
    parser.add_argument("--shard", default="1/1", help="part i/n of the trials; same --seed for all parts")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="repeats the trials")
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--scenario", action="append", dest="scenarios", choices=names, help="only these")
    parser.add_argument("--part", action="append", dest="parts", choices=list(PARTS), help="only these")
    parser.add_argument("--only", default="", help="only strata that contain this text")
    given = parser.parse_args()
    given.scenarios = given.scenarios or (SHORT_SCENARIOS if given.short else names)
    given.parts = given.parts or list(PARTS)
    limits = FULL if given.full else SHORT if given.short else SAMPLE
    given.limits = {part: limits.get(part, given.trials) for part in PARTS}
    if given.trials is not None:
        given.limits = dict.fromkeys(PARTS, given.trials)
    return given


def touched_source() -> dict[str, object]:
    """A result that says that model or text have changed."""
    return {
        "scenario": "all",
        "fault": "any",
        "stratum": "source",
        "number": 0,
        "code": None,
        "verdict": "foreign touched",
        "reason": "the model or the text has changed",
    }


if __name__ == "__main__":
    sys.exit(main())
