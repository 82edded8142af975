"""Two of everything: writers, exports, readers beside a writer, a holder that was stopped, stale locks,
clocks set back, folders that were moved or copied half way or are reached by two names."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.crash.server import Ended
from tests.crash.stage import Acting, Stage, Wrong, arguments_of
from tests.crash.trial import Laboratory, Result
from tests.crash.verdict import NAMED, last_lines
from tests.crash.world import files_of, mine

YEAR = 365 * 24 * 3600.0


def held(stage: Stage, scenario: str, at: str, number: int) -> Callable[[], Ended]:
    """A command that has stopped itself ahead of renaming something to `at`; SIGCONT goes on with it."""
    mark = stage.world.parent / "stopped"

    def stop() -> None:
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    ends = stage.start(arguments_of(scenario), Acting("rename", at, number, stop))
    stage.wait_for(mark)
    return ends


def go_on(stage: Stage) -> None:
    """Wake the command that `held` has stopped."""
    os.kill(int((stage.world.parent / "stopped").read_text()), signal.SIGCONT)


def two_writers(stage: Stage) -> None:
    """Two calibrations of one run at once: one goes to the end, the other is refused or finds it done."""
    stage.from_state(None)
    both = [stage.start(arguments_of("layerwise AWQ")) for _ in range(2)]
    codes = sorted(str(ends().code) for ends in both)
    if codes not in (["0", "2"], ["0", "0"]):
        raise Wrong(f"exit codes {codes}")
    stage.must_be("layerwise AWQ")


def two_exports(stage: Stage) -> None:
    """Two exports to one place at once."""
    stage.from_state("layerwise AWQ")
    both = [stage.start(arguments_of("export AWQ")) for _ in range(2)]
    codes = sorted(str(ends().code) for ends in both)
    if codes not in (["0", "2"], ["0", "0"]):
        raise Wrong(f"exit codes {codes}")
    stage.must_be("export AWQ")


def status_while_writing(stage: Stage) -> None:
    """Status, asked ahead of each publication of a commit, says how far the run is."""
    stage.from_state("half AWQ")
    ends = held(stage, "resume", "run/HEAD", 0)
    stage.must_end(stage.give(["status", "run"]), 0)
    go_on(stage)
    for _ in range(3):
        stage.must_end(stage.give(["status", "run"]), 0)
    stage.must_end(ends(), 0)
    stage.must_be("resume")


def export_while_solving(stage: Stage) -> None:
    """The statistics of a finished run are exported while a solver is added to it."""
    stage.from_state("calibrate")
    ends = held(stage, "second pass", "run/HEAD", 1)
    stage.must_end(stage.give(arguments_of("export")), 0)
    go_on(stage)
    stage.must_end(ends(), 0)
    stage.must_be("second pass")
    stage.must_be("export")


def stopped_holder(stage: Stage) -> None:
    """A writer that was stopped still holds its run; another is refused, and the first goes on."""
    stage.from_state(None)
    ends = held(stage, "layerwise AWQ", "run/HEAD", 1)
    stage.must_end(stage.give(arguments_of("layerwise AWQ")), 2)
    go_on(stage)
    stage.must_end(ends(), 0)
    stage.must_be("layerwise AWQ")


def stopped_export(stage: Stage) -> None:
    """The same for exports."""
    stage.from_state("layerwise AWQ")
    ends = held(stage, "export AWQ", "holdfast_journal.jsonl", 1)
    stage.must_end(stage.give(arguments_of("export AWQ")), 2)
    go_on(stage)
    stage.must_end(ends(), 0)
    stage.must_be("export AWQ")


def stale_lock(stage: Stage) -> None:
    """A lock file that names a process that is alive, but holds nothing."""
    stage.from_state("half AWQ")
    (stage.world / "run/.lock").write_text(f"{os.getpid()}\n")
    stage.must_end(stage.give(arguments_of("resume")), 0)
    stage.must_be("resume")


def clock_set_back(stage: Stage) -> None:
    """All files are from next year."""
    stage.from_state("half AWQ")
    future = time.time() + YEAR
    for name in files_of(stage.world):
        os.utime(stage.world / name, (future, future))
    stage.must_end(stage.give(arguments_of("resume")), 0)
    stage.must_be("resume")


def moved_half_way(stage: Stage) -> None:
    """A run that was moved between two commands."""
    stage.from_state("half AWQ")
    (stage.world / "run").rename(stage.world / "elsewhere")
    arguments = ["elsewhere" if word == "run" else word for word in arguments_of("resume")]
    stage.must_end(stage.give(arguments), 0)
    (stage.world / "elsewhere").rename(stage.world / "run")
    stage.must_be("resume")


def moved_while_writing(stage: Stage) -> None:
    """A run that is moved under a command, ahead of a commit's publication: no second one comes to be."""
    stage.from_state("half AWQ")
    run, moved = stage.world / "run", stage.world / "moved"
    ended = stage.give(arguments_of("resume"), Acting("create", "HEAD.tmp", 0, lambda: run.rename(moved)))
    if ended.code not in (0, 2, 75):
        raise Wrong(f"exit {ended.code}: {last_lines(ended)}")
    if files_of(run):
        raise Wrong(f"a second run came to be: {', '.join(sorted(files_of(run))[:3])}")
    run.rmdir() if run.exists() else None
    moved.rename(run)
    stage.must_end(stage.give(arguments_of("resume")), 0)
    stage.must_be("resume")


def copied_half_way(stage: Stage) -> None:
    """A copy that lacks its last files is refused or made whole; the original is not touched."""
    stage.from_state("layerwise AWQ")
    run, copy = stage.world / "run", stage.world / "copy"
    names = sorted(files_of(run))
    for share in (0.3, 0.7):
        for name in names[: int(len(names) * share)]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(run / name, copy / name)
        ended = stage.give(["copy" if word == "run" else word for word in arguments_of("export AWQ")])
        if ended.code == 0:
            raise Wrong(f"exported from {share:.0%} of a run")
        if ended.code not in (2, 4) or not NAMED.search(ended.output):
            raise Wrong(f"exit {ended.code}: {last_lines(ended)}")
        shutil.rmtree(copy)
    stage.must_be("layerwise AWQ")


def two_names_of_a_run(stage: Stage) -> None:
    """A run that a symbolic link leads to is the same run."""
    stage.from_state("half AWQ")
    (stage.world / "link").symlink_to("run")
    arguments = ["link" if word == "run" else word for word in arguments_of("resume")]
    ends = held(stage, "resume", "run/HEAD", 0)
    stage.must_end(stage.give(arguments), 2)
    go_on(stage)
    stage.must_end(ends(), 0)
    stage.must_end(stage.give(arguments), 0)
    stage.must_be("resume")


def two_names_of_an_export(stage: Stage) -> None:
    """OUT in a folder that is reached by two names."""
    stage.from_state("layerwise AWQ")
    (stage.world.parent / "other").symlink_to(stage.world)
    other = str(stage.world.parent / "other" / "out")
    arguments = [other if word == "out" else word for word in arguments_of("export AWQ")]
    ends = held(stage, "export AWQ", "holdfast_journal.jsonl", 1)
    stage.must_end(stage.give(arguments), 2)
    go_on(stage)
    stage.must_end(ends(), 0)
    stage.must_end(stage.give(arguments), 0)
    stage.must_be("export AWQ")


SITUATIONS: tuple[Callable[[Stage], None], ...] = (
    two_writers,
    two_exports,
    status_while_writing,
    export_while_solving,
    stopped_holder,
    stopped_export,
    stale_lock,
    clock_set_back,
    moved_half_way,
    moved_while_writing,
    copied_half_way,
    two_names_of_a_run,
    two_names_of_an_export,
)
NEEDS = ("layerwise AWQ", "export AWQ", "resume", "second pass", "export")
STATES = ("half AWQ", "layerwise AWQ", "calibrate")


def try_situation(laboratory: Laboratory, situation: Callable[[Stage], None], trial: Path) -> Result:
    """One situation, as a result."""
    trial.mkdir(parents=True)
    stage = Stage(laboratory, trial)
    verdict, reason = "identical", ""
    try:
        situation(stage)
        own = {name: digest for name, digest in mine(stage.world).items() if "elsewhere" not in name}
        templates = [mine(laboratory.folder / "templates" / name) for name in STATES]
        if own not in templates and own != {
            name: digest for name, digest in templates[0].items() if not name.startswith("run/")
        }:
            verdict, reason = "foreign touched", "files of a person's own differ"
    except Wrong as wrong:
        verdict, reason = "wrong", str(wrong)
    name = situation.__name__.replace("_", " ")
    if verdict == "identical":
        shutil.rmtree(trial)
    return Result("two of everything", name, name, 0, None, verdict, reason)
