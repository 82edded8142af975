import errno
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from state.background import BackgroundWriter
from state.durable import Disk
from state.errors import OutOfSpace, RunBusy
from state.head import Cursor, Head
from state.reader import open_run
from state.store import RunWriter
from state.update import Update
from tests.state import driver


class GatedDisk(Disk):
    """Waits for `gate` before publishing a head; `error` makes it fail there."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.error = 0

    def before(self, operation: str, path: Path) -> None:
        if operation == "publish":
            self.reached.set()
            assert self.gate.wait(30)
            if self.error:
                raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(halfway: Path) -> GatedDisk:
    return GatedDisk()


def update(batch: int) -> Update:
    return Update(Cursor(batch=batch), False, driver.observed(batch))


def test_submit_returns_before_the_commit_and_wait_gives_its_head(halfway: Path, disk: GatedDisk) -> None:
    told: list[tuple[Head, float]] = []
    with (
        RunWriter.resume(halfway, disk) as writer,
        BackgroundWriter(writer, lambda *facts: told.append(facts)) as background,
    ):
        assert background.wait().number == 2
        background.submit(update(3))
        assert disk.reached.wait(30)
        assert background.busy and open_run(halfway).head.number == 2
        disk.gate.set()
        head = background.wait()
        assert (head.number, head.cursor.batch, background.busy) == (3, 3, False)
        assert [known for known, _ in told] == [head] and told[0][1] > 0
    np.testing.assert_equal(dict(open_run(halfway).generation().arrays), dict(driver.observed(3).arrays))


def test_one_commit_is_in_flight_at_a_time(halfway: Path, disk: GatedDisk) -> None:
    with RunWriter.resume(halfway, disk) as writer, BackgroundWriter(writer) as background:
        background.submit(update(3))
        assert disk.reached.wait(30)
        second = threading.Thread(target=background.submit, args=(update(4),))
        second.start()
        assert second.is_alive() and not (halfway / "calibration.zarr/g000004").exists()
        disk.gate.set()
        second.join()
    assert open_run(halfway).head.cursor.batch == 4


@pytest.mark.parametrize("by", ["wait", "submit", "exit"])
def test_an_error_of_the_thread_reaches_the_caller(halfway: Path, disk: GatedDisk, by: str) -> None:
    disk.error = errno.ENOSPC
    disk.gate.set()
    with RunWriter.resume(halfway, disk) as writer, pytest.raises(OutOfSpace):  # noqa: SIM117
        with BackgroundWriter(writer) as background:
            background.submit(update(3))
            if by == "wait":
                background.wait()
            if by == "submit":
                background.submit(update(4))
    assert open_run(halfway).head.number == 2
    assert driver.drive(halfway) == ()
    np.testing.assert_equal(dict(open_run(halfway).generation().arrays), driver.statistics_after(3))


class Interruption(BaseException):
    """What a signal handler may raise at any moment."""


def test_the_lock_is_held_until_the_thread_ended_however_often_that_is_interrupted(
    halfway: Path, disk: GatedDisk
) -> None:
    """Signals that raise in the main thread while it waits for a commit."""
    sent = 0

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal sent
        sent += 1
        raise Interruption

    def send_and_open() -> None:
        assert disk.reached.wait(30)
        for _ in range(5):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        with pytest.raises(RunBusy):
            RunWriter.resume(halfway)
        disk.gate.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send_and_open)
    try:
        with pytest.raises(Interruption), RunWriter.resume(halfway, disk) as writer:  # noqa: SIM117
            with BackgroundWriter(writer) as background:
                sender.start()
                background.submit(update(3))
                background.wait()
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert sent > 1  # two that are sent while the process sleeps may arrive as one
    assert open_run(halfway).head.number == 3
    RunWriter.resume(halfway).close()
