"""Files that are not what was written: every kind of file of a run and of an export, damaged in every way,
and what the commands that read it make of that."""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.crash import server
from tests.crash.commands import SCENARIOS, Scenario, filled_in
from tests.crash.compare import content, newest_head
from tests.crash.server import Ended
from tests.crash.strata import kind_of_file
from tests.crash.trial import Laboratory, Result
from tests.crash.verdict import NAMED, Verdict, judge_end, last_lines
from tests.crash.world import MINE, begin, changed, files_of, mine


@dataclass(frozen=True)
class State:
    """Something stored, and the scenario whose command, given to it, must make it whole or refuse it.

    template: the state. other: one of other content, for swapping files.
    """

    name: str
    template: str
    scenario: str
    other: str


STATES = (
    State("finished run", "layerwise AWQ", "layerwise AWQ", "calibrate"),
    State("half-finished run", "half AWQ", "layerwise AWQ", "half calibrate"),
    State("finished run of GPTQ", "layerwise GPTQ", "layerwise GPTQ", "calibrate"),
    State("half-finished run of GPTQ", "half GPTQ", "layerwise GPTQ", "half calibrate"),
    State("run to be exported", "layerwise AWQ", "export AWQ", "calibrate"),
    State("finished export", "export", "export", "export AWQ"),
    State("half-finished export", "half export", "export", "export AWQ"),
)

Spoil = Callable[[bytes, bytes | None, random.Random], bytes | None]

SPOILS: dict[str, Spoil] = {
    "emptied": lambda data, other, chance: b"",
    "cut in half": lambda data, other, chance: data[: len(data) // 2],
    "last byte cut": lambda data, other, chance: data[:-1],
    "zeroed": lambda data, other, chance: bytes(len(data)),
    "byte added": lambda data, other, chance: data + b"\0",
    "bit flipped": lambda data, other, chance: flipped(data, chance.randrange(8 * max(len(data), 1))),
    "deleted": lambda data, other, chance: None,
    "another's": lambda data, other, chance: other,
}
"""Ways to damage a file: from its bytes, and those of a file of the same name elsewhere, to what is there
then; None: nothing."""

SAID = re.compile(r"damaged|missing|fell back|set aside|I/O error|not whole|differs|again|lost|differ", re.I)
BITS = 200
"""Single bits of records that a command is given."""
RECORD = re.compile(r".*(/HEAD|\.json|\.jsonl|\.writing)")
NO_RECORD = re.compile(r"(.*/)?\.(out\.)?lock")
"""Files that may be refused as what they are not (exit 2): they are no part of what is stored."""
MARK = re.compile(r".*/holdfast_partial\.json")
"""What makes a folder ours; without it the folder may be a person's, and OUT is refused (exit 2)."""


@dataclass(frozen=True)
class Damaged:
    """One file damaged in one way."""

    state: State
    path: str
    spoil: str
    seed: int


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit inverted."""
    if not data:
        return data
    place = bit // 8
    return data[:place] + bytes([data[place] ^ (1 << bit % 8)]) + data[place + 1 :]


def all_damages(laboratory: Laboratory, seed: int) -> list[Damaged]:
    """Every file of every state in every way: first one of each kind, turn about with single bits of small
    records, then the rest."""
    chance = random.Random(seed)
    first: list[Damaged] = []
    bits: list[Damaged] = []
    rest: list[Damaged] = []
    for state in STATES:
        template = laboratory.template(state.template)
        assert template is not None
        makes_run = state.template != "export" and "export" not in state.template
        names = [name for name in files_of(template) if _belongs(name, makes_run)]
        chance.shuffle(names)
        kinds: set[str] = set()
        for name in names:
            kind = kind_of_file(str(template / name), template)
            damages = [Damaged(state, name, spoil, chance.randrange(2**32)) for spoil in SPOILS]
            (rest if kind in kinds else first).extend(damages)
            kinds.add(kind)
            if RECORD.fullmatch(name):
                bits += [Damaged(state, name, "bit flipped", chance.randrange(2**32)) for _ in range(8)]
    for damages in (first, bits, rest):
        chance.shuffle(damages)
    bits = bits[:BITS]
    turns = [one for pair in zip(first, bits, strict=False) for one in pair]
    return [*turns, *first[len(bits) :], *rest]


def try_damage(laboratory: Laboratory, damaged: Damaged, trial: Path) -> Result:
    """Damage a file, give the command, and see what it says and leaves."""
    world = trial / "world"
    trial.mkdir(parents=True)
    begin(world, laboratory.template(damaged.state.template))
    before = mine(world)
    head = newest_head(world / "run") if damaged.path.startswith("run/") else None
    counted = frozenset(f"run/{path}" for path in (head or {"objects": ()})["objects"])
    original = (world / damaged.path).read_bytes()
    spoilt = SPOILS[damaged.spoil](original, _other(laboratory, damaged), random.Random(damaged.seed))
    if spoilt == original:
        shutil.rmtree(trial)
        return _result(damaged, world, None, Verdict("missed"))
    if spoilt is None:
        (world / damaged.path).unlink()
    else:
        (world / damaged.path).write_bytes(spoilt)
    scenario = _scenario(damaged.state)
    ended = server.call(
        partial(server.command, world, filled_in(scenario.arguments, laboratory.source)), trial / "log"
    )
    verdict = judge(laboratory, damaged, scenario, ended, world, counted)
    if mine(world) != before:
        verdict = Verdict("foreign touched", changed(before, mine(world)))
    result = _result(damaged, world, ended.code, verdict)
    if verdict.word in ("identical", "refused by name"):
        shutil.rmtree(trial)
    return result


def judge(
    laboratory: Laboratory,
    damaged: Damaged,
    scenario: Scenario,
    ended: Ended,
    world: Path,
    counted: frozenset[str],
) -> Verdict:
    """Recovered and said, or refused with exit 4 (3 where an identity is what was damaged) by name.

    counted: the files that the newest commit names; damage to others need not be told.
    """
    wrong = judge_end(ended, content(world, scenario.makes), laboratory.ends[scenario.name])
    if wrong is not None:
        return wrong
    if ended.code == 0:
        if damaged.path in counted and not SAID.search(ended.output):
            return Verdict("unsaid", "recovered, and the output does not tell of it")
        return Verdict("identical")
    fell_back = "fell back to commit" in ended.output  # and what is refused is the older commit, by itself
    unmarked = damaged.spoil == "deleted" and MARK.fullmatch(damaged.path) is not None
    otherwise = fell_back or unmarked or NO_RECORD.fullmatch(damaged.path) is not None
    allowed = (2, 3, 4) if otherwise else (3, 4)
    if ended.code not in allowed or not NAMED.search(ended.output):
        return Verdict("unnamed", f"exit {ended.code}: {last_lines(ended)}")
    return Verdict("refused by name", last_lines(ended))


def _belongs(name: str, makes_run: bool) -> bool:
    """Whether a file of a world is part of what the state is about."""
    return MINE not in name and (name.startswith("run/") == makes_run)


def _scenario(state: State) -> Scenario:
    return next(scenario for scenario in SCENARIOS if scenario.name == state.scenario)


def _other(laboratory: Laboratory, damaged: Damaged) -> bytes | None:
    """The bytes of the file of that name in the state of other content, or of any other file of its kind."""
    template, other = (laboratory.template(name) for name in (damaged.state.template, damaged.state.other))
    assert template is not None and other is not None
    if (other / damaged.path).is_file():
        return (other / damaged.path).read_bytes()
    kind = kind_of_file(str(template / damaged.path), template)
    for name, data in sorted(files_of(template).items()):
        if name != damaged.path and kind_of_file(str(template / name), template) == kind:
            return data
    return (template / damaged.path).read_bytes()


def _result(damaged: Damaged, world: Path, code: int | None, verdict: Verdict) -> Result:
    stratum = f"{damaged.state.name} | {kind_of_file(str(world / damaged.path), world)}"
    return Result(
        damaged.state.scenario, damaged.spoil, stratum, damaged.seed, code, verdict.word, verdict.reason
    )
