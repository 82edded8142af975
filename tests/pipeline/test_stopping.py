"""Processes that are told to stop: while they load, while they work, by a terminal that closes, or stuck."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from state.errors import RunBusy
from state.store import RunWriter

HOLDFAST = [sys.executable, "-c", "from pipeline.entry import main; main()"]
SMALL = ("--samples", "4096", "--seq", "32", "--batch", "1", "--commit-every", "0.1")
HELD = """
import time
from pathlib import Path
from state.place import PlacedDisk
def before(self, operation, path):
    while operation == "fsync" and "g000002" in str(path) and Path({hold!r}).exists():
        time.sleep(0.02)
    Path({log!r}).open("a").write(f"{{time.monotonic()}}\\n")
PlacedDisk.before = before
from pipeline.entry import main
main()
"""


def calibration(demo: Path, run: Path, *options: str) -> list[str]:
    return ["calibrate", str(demo / "model"), str(demo / "text.jsonl"), str(run), *options]


def start(command: list[str], **how: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def committed(run: Path, times: int) -> Callable[[], bool]:
    return lambda: (run / f"heads/{times:06d}.json").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_libraries_load_ends_the_command(demo: Path, tmp_path: Path, name: str) -> None:
    process = start([*HOLDFAST, *calibration(demo, tmp_path / "run")])
    assert process.stderr is not None
    assert process.stderr.readline() == "loading libraries\n"
    time.sleep(0.3)
    sent = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - sent < 20
    assert process.returncode == 75
    assert said.splitlines()[-1].startswith(f"holdfast: stopped by {name}")
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_heeded_and_a_scheduler_s_signal_commits(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(
        [*HOLDFAST, *calibration(demo, run, *SMALL)],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    until(committed(run, 2))
    process.send_signal(signal.SIGHUP)
    until(committed(run, 5))
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGUSR1" in said.splitlines()[-1]


def test_repeated_signals_leave_the_lock_to_the_commit_under_way(demo: Path, tmp_path: Path) -> None:
    run, log, hold = tmp_path / "run", tmp_path / "log", tmp_path / "hold"
    hold.touch()
    code = HELD.format(log=str(log), hold=str(hold))
    process = start([sys.executable, "-c", code, *calibration(demo, run, *SMALL)])
    until(lambda: (run / "calibration.zarr/g000002").exists())
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.25)
        assert is_busy(run)
    hold.unlink()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert committed(run, 2)(), "the commit under way was cut off"
    lines = log.read_text()
    RunWriter.resume(run).close()
    assert log.read_text() == lines, "somebody still wrote when the lock was free"


def is_busy(run: Path) -> bool:
    """Whether another process holds the lock. When none does, nobody has written since, either."""
    try:
        RunWriter.resume(run).close()
    except RunBusy:
        return True
    return False


def test_a_terminal_that_closes_commits(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(HOLDFAST[0], [*HOLDFAST, *calibration(demo, run, *SMALL)])
    os.set_blocking(terminal, False)

    def reading_until(condition: Callable[[], bool]) -> Callable[[], bool]:
        def look() -> bool:
            with suppress(BlockingIOError):
                os.read(terminal, 1 << 16)
            return condition()

        return look

    until(reading_until(committed(run, 3)))
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert '"signal": "SIGHUP"' in (run / "events.jsonl").read_text().splitlines()[-1]


STUCK = """
import sys, time, pipeline.leaving
pipeline.leaving.PATIENCE = 0.5
from stages.calibrate.signals import watch_signals
stop = watch_signals()
pipeline.leaving.leave_in_time(stop)
stop.manner = {manner!r}
stop.saving = lambda: time.monotonic() < began + {saving}
began = time.monotonic()
tell = ["ready"]
while True:
    try:
        while tell:
            print(tell.pop(), flush=True)
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.mark.parametrize(
    ("manner", "saving", "signals", "seconds"),
    [("raise", 0, 1, 0.5), ("wait", 0, 2, 1.2), ("wait", 3, 2, 3), ("end", 0, 1, 0.5)],
)
def test_a_stuck_process_is_ended_in_time_but_not_while_it_saves(
    manner: str, saving: float, signals: int, seconds: float
) -> None:
    process = start([sys.executable, "-c", STUCK.format(manner=manner, saving=saving)])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2 if signals > 1 else 0)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert seconds <= time.monotonic() - began + 0.1 < seconds + 10
    assert ("stopped by SIGTERM at once" in said) is (manner != "end")


def test_signals_that_come_together_are_one_request() -> None:
    process = start([sys.executable, "-c", STUCK.format(manner="wait", saving=0)])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    time.sleep(1.5)
    assert process.poll() is None
    process.kill()
    process.communicate()
