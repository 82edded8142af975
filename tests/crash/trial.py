"""One trial: a command is disturbed, the same command is given again, and what is there is compared."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.crash import server
from tests.crash.commands import SCENARIOS, Scenario, filled_in, maker_of
from tests.crash.compare import Content, content
from tests.crash.faults import CUTS, BadPath, Fault, Striking, left_by_cut
from tests.crash.interposer import Seen, Watcher
from tests.crash.server import Ended
from tests.crash.verdict import Verdict, judge_end, judge_rest, last_lines
from tests.crash.world import begin, changed, mine


@dataclass(frozen=True)
class Laboratory:
    """Where everything is, and how undisturbed commands end. ends: scenario → what it leaves."""

    folder: Path
    ends: dict[str, Content]

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def template(self, name: str | None) -> Path | None:
        """The folder of a state to begin from."""
        return None if name is None else self.folder / "templates" / name


@dataclass(frozen=True)
class Result:
    """How one trial went, as it is written to the results. `code` is that of the disturbed command."""

    scenario: str
    fault: str
    stratum: str
    number: int
    code: int | None
    verdict: str
    reason: str

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def run_trial(laboratory: Laboratory, scenario: Scenario, fault: Fault, trial: Path) -> Result:
    """Disturb a scenario by a fault, inside a new folder `trial`, deleted unless something is wrong."""
    world, mark = trial / "world", trial / "mark"
    trial.mkdir(parents=True)
    begin(world, laboratory.template(scenario.template))
    before = mine(world)

    def run(arguments: list[str], watch: Callable[[], Watcher] | None, log: str) -> Ended:
        def work() -> int:
            watcher = watch() if watch is not None else None
            filled = filled_in(arguments, laboratory.source)
            return server.command(world, filled, watcher, [laboratory.source])

        return server.call(work, trial / log)

    disturbed = run(scenario.arguments, lambda: Striking(fault, world, mark), "disturbed")
    if left_by_cut(mark).exists():
        shutil.rmtree(world)
        left_by_cut(mark).rename(world)
    if mark.exists():
        wrong = _judge(laboratory, scenario, fault, world, mark, disturbed, run)
        if mine(world) != before:
            wrong = Verdict("foreign touched", changed(before, mine(world)))
        survived = disturbed.killed or disturbed.code == 0
        good = Verdict("identical") if survived else Verdict("refused by name", last_lines(disturbed))
        verdict = wrong or good
    else:
        wrong, verdict = None, Verdict("missed")
    if wrong is None:
        shutil.rmtree(trial)
    return Result(
        scenario.name,
        fault.kind,
        fault.stratum,
        fault.number,
        disturbed.code,
        verdict.word,
        verdict.reason,
    )


def _judge(
    laboratory: Laboratory,
    scenario: Scenario,
    fault: Fault,
    world: Path,
    mark: Path,
    disturbed: Ended,
    run: Callable[[list[str], Callable[[], Watcher] | None, str], Ended],
) -> Verdict | None:
    """Give the command again until nothing disturbs it, and say what is wrong on the way.

    Where a path stays bad, it is given once more with the path still bad: it ends well or is refused. A
    repair may give such a file up, and say so; then calibrate makes again what is lost.
    """
    expected = laboratory.ends[scenario.name]
    found = content(world, scenario.makes)
    kept = found.objects if found is not None else {}
    lasting = fault.kind == "EIO for good"
    given_up = lasting and gave_up(scenario, disturbed)
    wrong = None if given_up else judge_end(disturbed, found, expected)
    if wrong is None and lasting and disturbed.code != 0:
        operation, _, struck = mark.read_text(encoding="utf-8").partition(" /")
        bad = Seen(operation, f"/{struck}", "")
        ended = run(scenario.arguments, lambda: BadPath(bad), "still bad")
        given_up = gave_up(scenario, ended)
        wrong = None if given_up else judge_end(ended, content(world, scenario.makes), expected)
    if wrong is not None:
        return wrong
    if given_up:
        maker = next(one for one in SCENARIOS if one.name == maker_of(scenario.template or ""))
        ended, expected = run(maker.arguments, None, "made again"), laboratory.ends[maker.name]
    else:
        ended = run(scenario.arguments, None, "again")
    found = content(world, scenario.makes)
    anew = given_up or fault.kind in CUTS
    return judge_end(ended, found, expected) or judge_rest(ended, found, expected, kept, anew, given_up)


def gave_up(scenario: Scenario, ended: Ended) -> bool:
    """Whether a repair has set aside what it could not read, and said so."""
    return scenario.arguments[0] == "repair" and ended.code == 0 and "set aside in" in ended.output


def undisturbed(laboratory: Laboratory, scenario: Scenario, world: Path, watcher: Watcher | None) -> int:
    """Run a scenario's command in this process, from its template, inside a new folder `world`."""
    begin(world, laboratory.template(scenario.template))
    arguments = filled_in(scenario.arguments, laboratory.source)
    return server.command(world, arguments, watcher, [laboratory.source])
