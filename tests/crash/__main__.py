"""The crash laboratory: disturbs calibrate, export and repair at every kind of file operation, gives the same
command again and compares every byte.

`make crash-test` takes a stratified sample within half an hour; `make crash-test-full` all of it.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import argparse
import random
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.crash.commands import SCENARIOS, Scenario
from tests.crash.pool import results
from tests.crash.prepare import Prepared, prepare
from tests.crash.report import Part, said, table, write_json
from tests.crash.sample import Planned, distinct, everything, possible, shard, stratified
from tests.crash.trial import run_trial
from tests.crash.world import files_of

MEMORY = Path("/dev/shm")


def main() -> int:
    """Run what the arguments ask for. Returns the exit code."""
    given = arguments()
    print(f"seed {given.seed} (--seed={given.seed} draws the same trials)", flush=True)
    where = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="holdfast-crash-", dir=where))
    until = time.monotonic() + given.minutes * 60
    prepared = prepare(folder / "lab", given.scenarios)
    source = files_of(prepared.laboratory.source)
    parts = [disturb(prepared, given, until)]
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
    parser.add_argument("--trials", type=int, help="at most so many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time")
    parser.add_argument("--shard", default="1/1", help="part i/n of the trials; same --seed for all parts")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="repeats the trials")
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--scenario", action="append", dest="scenarios", choices=names, help="only these")
    parser.add_argument("--only", default="", help="only strata that contain this text")
    given = parser.parse_args()
    given.scenarios = given.scenarios or names
    return given


def disturb(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """The trials of the interposer."""
    strata = {
        scenario: {stratum: count for stratum, count in found.items() if given.only in stratum}
        for scenario, found in prepared.strata.items()
    }
    drawn = everything(strata, given.seed, given.more) if given.full else stratified(strata, given.seed)
    number, _, of = given.shard.partition("/")
    planned = shard(drawn, int(number), int(of))[: given.trials]
    part = Part("file operations", possible(strata))
    kinds = {scenario.name: scenario for scenario in SCENARIOS}
    print(
        f"{possible(strata):,} trials are possible, {distinct(strata):,} of them of different kinds; "
        f"{len(planned):,} are planned",
        flush=True,
    )
    trials = prepared.laboratory.folder / "trials"
    pieces = [
        partial(one, prepared, kinds[plan.scenario], plan, trials / str(number))
        for number, plan in enumerate(planned)
    ]
    for done, (number, result) in enumerate(results(pieces, trials, given.jobs, until), 1):
        plan = planned[number]
        if "failed" in result:
            result = {
                "scenario": plan.scenario,
                "fault": plan.fault.kind,
                "stratum": plan.fault.stratum,
                "number": plan.fault.number,
                "code": None,
                "verdict": "the laboratory failed",
                "reason": result["failed"],
            }
        part.results.append(result)
        if part.wrong and part.wrong[-1] is result:
            print(f"{said(result)} [{trials / str(number)}]", flush=True)
        if done % 100 == 0:
            print(f"{done:,}/{len(planned):,} trials, {len(part.wrong)} wrong", flush=True)
    return part


def one(prepared: Prepared, scenario: Scenario, plan: Planned, trial: Path) -> dict[str, object]:
    """One trial, as JSON."""
    return run_trial(prepared.laboratory, scenario, plan.fault, trial).as_json()


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
