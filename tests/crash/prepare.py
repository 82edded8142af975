"""Makes a laboratory: the model and text, the states that commands begin from, how undisturbed commands end,
and how many operations of each stratum they make."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.crash import server
from tests.crash.commands import HALFWAY, SCENARIOS, SPOILT, Halfway, Scenario, maker_of
from tests.crash.compare import Content, content, newest_head
from tests.crash.faults import Fault, Striking
from tests.crash.strata import Census
from tests.crash.trial import Laboratory, undisturbed
from tests.crash.world import IN_OUT, IN_RUN, make_source, put_files

HEAD_PUBLISHED = "rename | run/HEAD | "
JOURNAL_PUBLISHED = "rename | out.partial/holdfast_journal.jsonl | "


@dataclass(frozen=True)
class Prepared:
    """A laboratory, and for each scenario its strata: stratum → number of its operations."""

    laboratory: Laboratory
    strata: dict[str, dict[str, int]]


def prepare(folder: Path, wanted: Sequence[str], states: Sequence[str] = ()) -> Prepared:
    """Make a laboratory in a new folder for the scenarios that are wanted, by name, with their templates and
    those named in `states`.

    Raises:
        RuntimeError: a command failed that nothing disturbed.
    """
    folder = folder.resolve()
    (folder / "templates").mkdir(parents=True)
    _must(server.call(lambda: make_source(folder / "source") or 0, folder / "log"), "making the model")
    laboratory = Laboratory(folder, {})
    strata: dict[str, dict[str, int]] = {}
    for scenario in needed([*wanted, *(maker_of(state) for state in states)]):
        if scenario.template is not None:
            _make_template(laboratory, scenario.template, strata)
        strata[scenario.name] = _finish(laboratory, scenario)
    for state in states:
        _make_template(laboratory, state, strata)
    return Prepared(laboratory, {name: strata[name] for name in wanted})


def needed(wanted: Sequence[str]) -> list[Scenario]:
    """The scenarios wanted, and before each those whose ends they begin from."""
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    found: dict[str, Scenario] = {}

    def add(name: str) -> None:
        scenario = by_name[name]
        if scenario.template is not None:
            add(maker_of(scenario.template))
        found.setdefault(name, scenario)

    for name in wanted:
        add(name)
    return list(found.values())


def _finish(laboratory: Laboratory, scenario: Scenario) -> dict[str, int]:
    """Run a scenario to its end and keep what it leaves. Returns its strata."""
    world = laboratory.folder / "ends" / scenario.name
    counts, modules = laboratory.folder / "counts", laboratory.folder / "modules"

    def work() -> int:
        census = Census(world)
        code = undisturbed(laboratory, scenario, world, census)
        counts.write_text(json.dumps(dict(census.counts)), encoding="utf-8")
        server.note_modules(modules)
        return code

    _must(server.call(work, laboratory.folder / "log", longest=600), scenario.name)
    server.import_noted(modules)
    end = content(world, scenario.makes)
    if end is None:
        raise RuntimeError(f"{scenario.name} left nothing")
    laboratory.ends[scenario.name] = Content(end.files, end.strays, end.commits)
    found: dict[str, int] = json.loads(counts.read_text(encoding="utf-8"))
    return found


def _make_template(laboratory: Laboratory, state: str, strata: dict[str, dict[str, int]]) -> None:
    """A state to begin from: the end of a scenario, or that one killed on its way, and a person's files in
    it."""
    target = laboratory.folder / "templates" / state
    if target.exists():
        return
    halfway = {one.name: one for one in HALFWAY}
    if state in halfway:
        _kill_halfway(laboratory, halfway[state], target, strata)
    else:
        shutil.copytree(laboratory.folder / "ends" / maker_of(state), target)
    if (target / "run" / "HEAD").exists():
        put_files(target / "run", IN_RUN)
    for name in {one.name: one.deleted for one in SPOILT}.get(state, ()):
        (target / name).unlink()
    if (target / "out").is_dir():
        put_files(target / "out", IN_OUT)


def _kill_halfway(
    laboratory: Laboratory, halfway: Halfway, target: Path, strata: dict[str, dict[str, int]]
) -> None:
    scenario = next(one for one in SCENARIOS if one.name == halfway.scenario)
    publishes = HEAD_PUBLISHED if scenario.makes == "run" else JOURNAL_PUBLISHED
    stratum = next(name for name in strata[scenario.name] if name.startswith(publishes))
    fault = Fault("kill after", stratum, halfway.commits)
    mark = laboratory.folder / "mark"

    def work() -> int:
        return undisturbed(laboratory, scenario, target, Striking(fault, target, mark))

    ended = server.call(work, laboratory.folder / "log")
    if not ended.killed or (scenario.makes == "run" and newest_head(target / "run") is None):
        raise RuntimeError(f"{halfway.name} could not be made: {ended.output}")


def _must(ended: server.Ended, what: str) -> None:
    if ended.code != 0:
        raise RuntimeError(f"{what} failed with {ended.code}: {ended.output}")
