"""One trial: a command is disturbed, the same command is given again, and what is there is compared."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.crash import server
from tests.crash.commands import Scenario, filled_in
from tests.crash.compare import Content, content
from tests.crash.faults import CUTS, BadPath, Fault, Striking
from tests.crash.interposer import Watcher
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
    """Disturb a scenario by a fault, inside a new folder `trial`, which is deleted unless something is wrong.

    Where the fault is a bad path, the command is given once more with the path still bad: it ends well or is
    refused.
    """
    world, mark = trial / "world", trial / "mark"
    trial.mkdir(parents=True)
    begin(world, laboratory.template(scenario.template))
    before = mine(world)
    expected = laboratory.ends[scenario.name]
    arguments = filled_in(scenario.arguments, laboratory.source)

    def run(watch: Callable[[], Watcher] | None, log: str) -> Ended:
        def work() -> int:
            watcher = watch() if watch is not None else None
            return server.command(world, arguments, watcher, [laboratory.source])

        return server.call(work, trial / log)

    def result(ended: Ended, verdict: Verdict) -> Result:
        if verdict.word in ("identical", "refused by name", "missed"):
            shutil.rmtree(trial)
        return Result(
            scenario.name,
            fault.kind,
            fault.stratum,
            fault.number,
            ended.code,
            verdict.word,
            verdict.reason,
        )

    disturbed = run(lambda: Striking(fault, world, mark), "disturbed")
    if not mark.exists():
        return result(disturbed, Verdict("missed"))
    struck = mark.read_text(encoding="utf-8").partition(" /")[2]
    ended, wrong = disturbed, judge_end(disturbed, content(world, scenario.makes), expected)
    found = content(world, scenario.makes)
    kept = found.objects if found is not None else {}
    if wrong is None and fault.kind == "EIO for good" and disturbed.code != 0:
        ended = run(lambda: BadPath(f"/{struck}"), "still bad")
        wrong = judge_end(ended, content(world, scenario.makes), expected)
    if wrong is None:
        ended = run(None, "again")
        found = content(world, scenario.makes)
        forgotten = fault.kind in CUTS
        wrong = judge_end(ended, found, expected) or judge_rest(ended, found, expected, kept, forgotten)
    after = mine(world)
    if after != before:
        wrong = Verdict("foreign touched", changed(before, after))
    if wrong is not None:
        return result(disturbed, wrong)
    if disturbed.killed or disturbed.code == 0:
        return result(disturbed, Verdict("identical"))
    return result(disturbed, Verdict("refused by name", last_lines(disturbed)))


def undisturbed(laboratory: Laboratory, scenario: Scenario, world: Path, watcher: Watcher | None) -> int:
    """Run a scenario's command in this process, from its template, inside a new folder `world`."""
    begin(world, laboratory.template(scenario.template))
    arguments = filled_in(scenario.arguments, laboratory.source)
    return server.command(world, arguments, watcher, [laboratory.source])
