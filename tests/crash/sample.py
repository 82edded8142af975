"""Which trials are made: every kind of operation with every fault, or a stratified part of them."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from tests.crash.faults import Fault, faults_of
from tests.crash.interposer import READS

Strata = dict[str, dict[str, int]]
"""Scenario → stratum → number of operations."""


@dataclass(frozen=True)
class Planned:
    """One trial to be made."""

    scenario: str
    fault: Fault


def possible(strata: Strata) -> int:
    """How many trials there are: every operation of every scenario with every fault."""
    return sum(
        count * len(faults_of(_operation(stratum)))
        for found in strata.values()
        for stratum, count in found.items()
    )


def distinct(strata: Strata) -> int:
    """How many of them differ in more than a number: every stratum of every scenario with every fault."""
    return sum(len(faults_of(_operation(stratum))) for found in strata.values() for stratum in found)


def everything(strata: Strata, seed: int, more: int) -> list[Planned]:
    """Every stratum of every scenario with every fault, at an occurrence drawn, and `more` others."""
    chance = random.Random(seed)
    cells = _cells(strata)
    once = [_drawn(cell, strata, chance) for cell in cells]
    weights = [strata[scenario][stratum] for scenario, stratum, _ in cells]
    rest = [_drawn(cell, strata, chance) for cell in chance.choices(cells, weights, k=more)]
    chance.shuffle(once)
    return list(dict.fromkeys(once + rest))


def stratified(strata: Strata, seed: int) -> list[Planned]:
    """All strata with all faults in an order of which any beginning is a fair sample: first each stratum and
    fault once, in whichever scenario chance picks, then once more in another, and so on."""
    chance = random.Random(seed)
    cells = _cells(strata)
    chance.shuffle(cells)
    rounds: dict[int, list[Planned]] = defaultdict(list)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for cell in cells:
        turn = seen[cell[1:]]
        seen[cell[1:]] += 1
        rounds[turn].append(_drawn(cell, strata, chance))
    return [planned for turn in sorted(rounds) for planned in _woven(rounds[turn])]


def _woven(planned: list[Planned]) -> list[Planned]:
    """Three trials at operations that change something to one at a read, as long as there are any."""
    reads = [one for one in planned if _operation(one.fault.stratum) in READS]
    changes = iter([one for one in planned if _operation(one.fault.stratum) not in READS])
    woven = [one for read in reads for one in (*islice(changes, 3), read)]
    return [*woven, *changes]


def shard(planned: Sequence[Planned], number: int, of: int) -> list[Planned]:
    """Part `number` (from 1) of `of` parts."""
    return list(planned[number - 1 :: of])


def _cells(strata: Strata) -> list[tuple[str, str, str]]:
    return [
        (scenario, stratum, fault)
        for scenario, found in sorted(strata.items())
        for stratum in sorted(found)
        for fault in faults_of(_operation(stratum))
    ]


def _drawn(cell: tuple[str, str, str], strata: Strata, chance: random.Random) -> Planned:
    scenario, stratum, fault = cell
    number = chance.randrange(strata[scenario][stratum])
    return Planned(scenario, Fault(fault, stratum, number, chance.randrange(2**32)))


def _operation(stratum: str) -> str:
    return stratum.split(" | ")[0]
