"""Runs commands in forks of a process that has imported everything, so that a trial costs no imports."""

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.crash.interposer import Interposer, Watcher

LONGEST = 60.0  # seconds that a command may take before it counts as hung
POLL = 0.002


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code` is its exit code, negative for the signal that killed it, None where it
    hung."""

    code: int | None
    output: str

    @property
    def killed(self) -> bool:
        """Whether it died by SIGKILL, as a fault asks for."""
        return self.code == -signal.SIGKILL


def call(work: Callable[[], int], log: Path, longest: float = LONGEST) -> Ended:
    """Do some work in a fork, its output in the file `log`. It returns the exit code."""
    process = start(work, log)
    return wait(process, log, longest)


def start(work: Callable[[], int], log: Path) -> int:
    """Begin some work in a fork. Returns the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        code = work()
    except BaseException as error:
        print(f"the laboratory itself: {type(error).__name__}: {error}", file=sys.stderr)
        code = 70
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(process: int, log: Path, longest: float = LONGEST) -> Ended:
    """Wait for a fork; one that takes longer than `longest` seconds is killed, and hung."""
    until = time.monotonic() + longest
    hung = False
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > until and not hung:
            os.kill(process, signal.SIGKILL)
            hung = True
        time.sleep(POLL)
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(None if hung else os.waitstatus_to_exitcode(ended[1]), output)


def command(
    folder: Path,
    arguments: list[str],
    watcher: Watcher | None = None,
    roots: list[Path] | None = None,
    really_sync: bool = False,
) -> int:
    """Run `holdfast ARGUMENTS` inside `folder`, in this process. Returns its exit code.

    The watcher sees every operation below `folder` and `roots`.
    """
    from pipeline.cli import app

    commit_after_every_batch()
    os.chdir(folder)
    watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if watcher is not None:
        watching = Interposer([folder, *(roots or [])], watcher, really_sync).watching()
    with watching:
        try:
            app(arguments, prog_name="holdfast")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def commit_after_every_batch() -> None:
    """The whole-model schedule commits by the clock, and leaves a commit out while one is being written.
    With `--commit-every` near zero and this, it commits after every batch, so that trials repeat."""
    from state.background import BackgroundWriter

    BackgroundWriter.busy = property(lambda self: False)  # type: ignore[method-assign, assignment]


def note_modules(file: Path) -> None:
    """Write the names of all modules that this process has imported."""
    file.write_text("\n".join(sys.modules), encoding="utf-8")


def import_noted(file: Path) -> None:
    """Import here what a fork has noted, so that later ones find it imported."""
    for name in file.read_text(encoding="utf-8").split("\n"):
        if name not in sys.modules and name.split(".")[0] not in ("__main__", "__mp_main__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
