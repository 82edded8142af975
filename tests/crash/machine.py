"""A person and bad luck, in any order: calibrate, be killed, go on, add a solver, export, damage a file,
check, repair. Whatever the order, a command that ends with 0 has made what it says.

Hypothesis draws the steps. A series that fails is not made shorter: every step is a command of a second.
"""

import itertools
import shutil
import traceback
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.crash import server
from tests.crash.commands import SCENARIOS, filled_in
from tests.crash.compare import content, differing
from tests.crash.damage import SPOILS, flipped
from tests.crash.faults import Fault, Striking
from tests.crash.prepare import Prepared
from tests.crash.server import Ended
from tests.crash.strata import kind_of_file
from tests.crash.trial import Result
from tests.crash.verdict import NAMED, REFUSALS, last_lines
from tests.crash.world import IN_RUN, MINE, begin, files_of, mine, put_files

NEEDS = ("calibrate", "second pass", "export")
OF_THE_WAY = ("cursor", "run.json")
"""What depends on the commands that led to a run, and not on what it holds."""
WAYS = [name for name in SPOILS if name not in ("another's", "bit flipped")]


class Person(RuleBasedStateMachine):
    """A run and an export in one folder. `prepared` and `folder` are set by whoever runs it."""

    prepared: ClassVar[Prepared]
    folder: ClassVar[Path]
    numbers: ClassVar = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.place = self.folder / f"person{next(self.numbers)}"
        self.world = self.place / "world"
        self.damaged = False
        self.log = 0

    @initialize()
    def start(self) -> None:
        """Nothing has been begun."""
        self.place.mkdir(parents=True)
        begin(self.world, None)
        self.mine = mine(self.world)

    @rule()
    def calibrate(self) -> None:
        """Statistics, begun or gone on with."""
        self.must(self.give(self.arguments("calibrate")), "calibrate")

    @rule()
    def add_solver(self) -> None:
        """A second pass, or one that has to make statistics first."""
        self.must(self.give(self.arguments("second pass")), "second pass")

    @rule()
    def export(self) -> None:
        """A checkpoint from the statistics; refused as long as there are none."""
        self.must(self.give(self.arguments("export")), "export")

    @rule(scenario=st.sampled_from(NEEDS), data=st.data())
    def killed(self, scenario: str, data: st.DataObject) -> None:
        """A command is killed at an operation, if it gets there."""
        changes = [
            stratum
            for stratum in sorted(self.prepared.strata[scenario])
            if not stratum.startswith(("open", "read", "list", "stat"))
        ]
        fault = Fault(
            data.draw(st.sampled_from(("kill before", "kill after"))), data.draw(st.sampled_from(changes)), 0
        )
        mark = self.place / "mark"
        ended = self.give(self.arguments(scenario), fault, mark)
        if not ended.killed:
            self.must(ended, scenario)

    @precondition(lambda self: (self.world / "run/HEAD").exists())
    @rule(way=st.sampled_from(WAYS), data=st.data())
    def damage(self, way: str, data: st.DataObject) -> None:
        """One file of the run is damaged: one of a kind drawn, so that small files have the same chance."""
        names = [name for name in files_of(self.world) if name.startswith("run/") and MINE not in name]
        kinds: dict[str, list[str]] = {}
        for name in sorted(names):
            kinds.setdefault(kind_of_file(str(self.world / name), self.world), []).append(name)
        name = data.draw(st.sampled_from(kinds[data.draw(st.sampled_from(sorted(kinds)))]))
        bytes_now = (self.world / name).read_bytes()
        spoilt = SPOILS[way](bytes_now, None, None)  # type: ignore[arg-type]
        if spoilt is None:
            (self.world / name).unlink()
        else:
            (self.world / name).write_bytes(spoilt)
        self.damaged = True

    @precondition(lambda self: (self.world / "run/HEAD").exists())
    @rule(data=st.data())
    def flip(self, data: st.DataObject) -> None:
        """One bit of HEAD or of a head changes."""
        names = [
            "HEAD",
            *(path.relative_to(self.world / "run").as_posix() for path in self.world.glob("run/heads/*")),
        ]
        path = self.world / "run" / data.draw(st.sampled_from(sorted(names)))
        if path.is_file() and MINE not in path.name:
            bytes_now = path.read_bytes()
            bit = data.draw(st.integers(0, max(8 * len(bytes_now) - 1, 0)))
            path.write_bytes(flipped(bytes_now, bit))
            self.damaged = True

    @precondition(lambda self: (self.world / "run/HEAD").exists())
    @rule()
    def own_files(self) -> None:
        """A person keeps files in the run."""
        put_files(self.world / "run", IN_RUN)
        self.mine = mine(self.world)

    @rule()
    def check(self) -> None:
        """`check` changes nothing, and says 0 only of what is whole."""
        before = files_of(self.world)
        ended = self.give(["check", "run"])
        self.must_be_named(ended)
        after = files_of(self.world)
        assert {name for name in before if before[name] != after.get(name)} <= {"run/.lock"}
        if ended.code == 0:
            self.damaged = False

    @rule()
    def repair(self) -> None:
        """`repair` ends well or is refused by name."""
        self.must_be_named(self.give(["repair", "run"]))

    @rule()
    def status(self) -> None:
        """`status` ends well or is refused by name."""
        self.must_be_named(self.give(["status", "run"]))

    @invariant()
    def nothing_foreign_is_touched(self) -> None:
        """A person's files are as they were."""
        if hasattr(self, "mine"):
            assert mine(self.world) == self.mine

    def teardown(self) -> None:
        """Go on to the end: what was not damaged ends identical."""
        if not self.damaged and hasattr(self, "mine"):
            ended = self.give(self.arguments("calibrate"))
            assert ended.code == 0, last_lines(ended)
            self.must(ended, "calibrate")
        shutil.rmtree(self.place, ignore_errors=True)

    def arguments(self, scenario: str) -> list[str]:
        """The arguments of a scenario; an export does not go by the recipe that the run was begun with."""
        arguments = next(one.arguments for one in SCENARIOS if one.name == scenario)
        return [*arguments, "--recipe", "nvfp4", "--overwrite"] if scenario == "export" else arguments

    def give(self, arguments: list[str], fault: Fault | None = None, mark: Path | None = None) -> Ended:
        """Give a command, and wait for its end."""
        self.log += 1
        filled = filled_in(arguments, self.prepared.laboratory.source)

        def work() -> int:
            watcher = Striking(fault, self.world, mark) if fault is not None and mark is not None else None
            return server.command(self.world, filled, watcher)

        return server.call(work, self.place / f"log{self.log}")

    def must(self, ended: Ended, scenario: str) -> None:
        """What a command says must be so: exit 0 only with the bytes that it makes undisturbed."""
        self.must_be_named(ended)
        if ended.code != 0:
            return
        makes = next(one.makes for one in SCENARIOS if one.name == scenario)
        found = content(self.world, makes)
        assert found is not None, f"{scenario}: exit 0, and nothing is there"
        expected = self.prepared.laboratory.ends[scenario]
        # A run may hold solutions of another command, and says which command it was begun with.
        names = [
            name for name in differing(expected, found) if name in expected.files and name not in OF_THE_WAY
        ]
        assert not names, f"{scenario}: exit 0, and other bytes in {', '.join(names[:3])}"

    def must_be_named(self, ended: Ended) -> None:
        """A command ends with 0, or is refused by name."""
        if ended.code != 0:
            assert ended.code in REFUSALS and NAMED.search(ended.output), f"{ended.code}: {last_lines(ended)}"


def try_series(prepared: Prepared, number: int, series: int, steps: int, folder: Path) -> Result:
    """Some series of steps, drawn by the seed `number`, in a process of their own."""
    Person.prepared, Person.folder = prepared, folder
    verdict, reason = "identical", ""
    try:
        run_state_machine_as_test(
            seed(number)(Person),
            settings=settings(
                max_examples=series,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        verdict, reason = "wrong", "".join(traceback.format_exception(error))[-3000:]
    return Result("series", f"{series} of {steps} steps", "any", number, None, verdict, reason)
