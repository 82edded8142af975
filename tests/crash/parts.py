"""The parts of the laboratory, each a list of trials that the pool makes."""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

from tests.crash import device
from tests.crash.bits import Record, bits_of, records, try_bits
from tests.crash.commands import SCENARIOS
from tests.crash.damage import STATES, all_damages, try_damage
from tests.crash.interposer import READS
from tests.crash.machine import try_series
from tests.crash.pool import Piece, results
from tests.crash.prepare import Prepared
from tests.crash.report import Part, said
from tests.crash.sample import Planned, distinct, everything, possible, shard, stratified
from tests.crash.trial import run_trial
from tests.crash.twice import SITUATIONS, try_situation

TELL_EVERY = 100
CUTS = 10
"""Real power cuts of one run."""
SERIES = 1000
"""Series of commands that there could be, as far as the laboratory counts them."""


def operations(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """Faults at the operations of the commands."""
    strata = {
        scenario: {stratum: count for stratum, count in found.items() if given.only in stratum}
        for scenario, found in prepared.strata.items()
        if scenario in given.scenarios
    }
    drawn = everything(strata, given.seed, given.more) if given.full else stratified(strata, given.seed)
    planned = _share("operations", drawn, given)
    print(f"{distinct(strata):,} of the trials that are possible are of different kinds", flush=True)
    trials = prepared.laboratory.folder / "operations"
    pieces = [
        partial(_operation, prepared, plan, trials / str(number)) for number, plan in enumerate(planned)
    ]
    part = Part("file operations", possible(strata))
    return gather(part, pieces, [_of(plan) for plan in planned], trials, given.jobs, until)


def damages(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """Damage to every kind of file."""
    drawn = [one for one in all_damages(prepared.laboratory, given.seed) if given.only in one.path]
    planned = _share("damage", drawn, given)
    trials = prepared.laboratory.folder / "damages"
    pieces = [
        partial(_damage, prepared, damaged, trials / str(number)) for number, damaged in enumerate(planned)
    ]
    facts = [_facts(one.state.name, one.spoil, one.path, one.seed) for one in planned]
    return gather(Part("damage", len(drawn)), pieces, facts, trials, given.jobs, until)


def bits(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """Single bits of the small records; a trial is a record."""
    laboratory = prepared.laboratory
    drawn = [one for one in records(laboratory) if given.only in one.path]
    random.Random(given.seed).shuffle(drawn)
    planned = _share("bits", drawn, given)
    trials = laboratory.folder / "bits"
    pieces = [partial(_bits, prepared, one, given.full, given.seed) for one in planned]
    facts = [_facts(one.state, "one bit, in process", one.path, 0) for one in planned]
    part = gather(Part("single bits, by record", len(drawn)), pieces, facts, trials, given.jobs, until)
    tried = sum(result["number"] for result in part.results)
    print(f"{tried:,} bits of {len(part.results):,} records were inverted, one at a time", flush=True)
    return part


def situations(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """Two of everything."""
    drawn = [one for one in SITUATIONS if given.only in one.__name__]
    planned = _share("twice", drawn, given)
    trials = prepared.laboratory.folder / "situations"
    pieces = [partial(_situation, prepared, one, trials / str(number)) for number, one in enumerate(planned)]
    facts = [_facts("two of everything", one.__name__, one.__name__, 0) for one in planned]
    return gather(Part("two of everything", len(drawn)), pieces, facts, trials, given.jobs, until)


def cuts(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """Real power cuts, where this machine can have them."""
    part = Part("real power cuts", 0)
    if lacks := device.missing():
        print(f"real power cuts: none tried, for want of {lacks}", flush=True)
        return part
    chance = random.Random(given.seed)
    drawn = [(device.CUT[turn % len(device.CUT)], chance.randrange(2**32)) for turn in range(CUTS)]
    planned = _share("cuts", drawn, given)
    part.possible = sum(
        count
        for name in device.CUT
        for stratum, count in prepared.strata[name].items()
        if stratum.split(" | ")[0] not in READS
    )
    trials = prepared.laboratory.folder / "cuts"
    pieces = [partial(_cut, prepared, *one, trials / str(number)) for number, one in enumerate(planned)]
    facts = [_facts(name, "real power cut", "change", seed) for name, seed in planned]
    return gather(part, pieces, facts, trials, given.jobs, until)


def series(prepared: Prepared, given: argparse.Namespace, until: float) -> Part:
    """Series of steps that hypothesis draws."""
    chance = random.Random(given.seed)
    planned = _share("series", [chance.randrange(2**32) for _ in range(SERIES)], given)
    trials = prepared.laboratory.folder / "series"
    pieces = [partial(_series, prepared, given.steps, number, trials / str(number)) for number in planned]
    facts = [_facts("series", "series", "any", number) for number in planned]
    return gather(Part("series of commands", SERIES), pieces, facts, trials, given.jobs, until)


DAMAGE_STATES = tuple(dict.fromkeys(name for state in STATES for name in (state.template, state.other)))


def gather(
    part: Part, pieces: list[Piece], facts: list[dict[str, Any]], trials: Path, jobs: int, until: float
) -> Part:
    """Let the pool make all trials, telling of what goes wrong as it comes.

    facts: what a result says of each trial where the laboratory itself failed.
    """
    print(f"{part.name}: {part.possible:,} trials are possible, {len(pieces):,} are planned", flush=True)
    for done, (number, result) in enumerate(results(pieces, trials, jobs, until), 1):
        if "failed" in result:
            result = facts[number] | {"verdict": "the laboratory failed", "reason": result["failed"]}
        part.results.append(result)
        if part.is_wrong(result):
            print(f"{said(result)} [{trials / str(number)}]", flush=True)
        if done % TELL_EVERY == 0:
            print(f"{part.name}: {done:,}/{len(pieces):,}, {len(part.wrong)} wrong", flush=True)
    return part


def _share(part: str, drawn: list[Any], given: argparse.Namespace) -> list[Any]:
    """The trials of a part that this shard makes, within its limit."""
    number, _, of = given.shard.partition("/")
    return shard(drawn, int(number), int(of))[: given.limits[part]]


def _operation(prepared: Prepared, plan: Planned, trial: Path) -> dict[str, Any]:
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == plan.scenario)
    return run_trial(prepared.laboratory, scenario, plan.fault, trial).as_json()


def _damage(prepared: Prepared, damaged: Any, trial: Path) -> dict[str, Any]:
    return try_damage(prepared.laboratory, damaged, trial).as_json()


def _situation(prepared: Prepared, situation: Any, trial: Path) -> dict[str, Any]:
    return try_situation(prepared.laboratory, situation, trial).as_json()


def _cut(prepared: Prepared, scenario: str, seed: int, trial: Path) -> dict[str, Any]:
    return device.try_cut(prepared.laboratory, prepared.strata[scenario], scenario, seed, trial).as_json()


def _series(prepared: Prepared, steps: int, number: int, trial: Path) -> dict[str, Any]:
    return try_series(prepared, number, 1, steps, trial).as_json()


def _bits(prepared: Prepared, record: Record, all_bits: bool, seed: int) -> dict[str, Any]:
    chosen = bits_of(prepared.laboratory, record, all_bits, seed)
    return try_bits(prepared.laboratory, record, chosen).as_json()


def _of(plan: Planned) -> dict[str, Any]:
    return _facts(plan.scenario, plan.fault.kind, plan.fault.stratum, plan.fault.number)


def _facts(scenario: str, fault: str, stratum: str, number: int) -> dict[str, Any]:
    return {"scenario": scenario, "fault": fault, "stratum": stratum, "number": number, "code": None}
