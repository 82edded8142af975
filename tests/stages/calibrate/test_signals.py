"""Signals and time limits as a request to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from stages.calibrate.signals import Interrupted, StopRequest, stop_on_signal


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_raised_where_nothing_is_to_be_saved(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=name), stop_on_signal() as stop:
        assert not stop
        send(number)
    assert (bool(stop), stop.name) == (True, name)
    assert signal.getsignal(number) is before


def test_while_work_must_be_saved_signals_only_ask_however_often_they_come() -> None:
    with stop_on_signal() as stop:
        with stop.waiting(lambda: True):
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert (stop.name, stop.manner, stop.saving()) == ("SIGTERM", "wait", True)
        assert (stop.manner, stop.saving()) == ("raise", False)


def test_a_stretch_that_is_lost_anyway_is_left_once() -> None:
    with stop_on_signal() as stop, stop.waiting(bool):
        with pytest.raises(Interrupted), stop.at_once():
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # whoever waits for a commit now is not disturbed
        with pytest.raises(Interrupted), stop.at_once():
            pytest.fail("nothing new is begun after a request")


def test_a_request_that_a_library_swallowed_is_still_there() -> None:
    with stop_on_signal() as stop:
        with suppress(BaseException):
            send(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            send(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_whoever_watches_within_gets_the_same_request() -> None:
    with stop_on_signal() as outer:
        with stop_on_signal() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) == outer.signalled


def test_a_time_limit_is_raised_as_a_signal_is() -> None:
    with (
        pytest.raises(Interrupted, match="--stop-after 1s"),
        stop_on_signal() as stop,
        stop.limited(0.05, "--stop-after 1s"),
    ):
        until(lambda: False)


def test_a_time_limit_only_asks_while_work_must_be_saved() -> None:
    with stop_on_signal() as stop, stop.waiting(bool), stop.limited(0.05, "--stop-after 1s"):
        until(lambda: bool(stop))
        assert stop.name == "--stop-after 1s"


def test_a_time_limit_counts_from_the_beginning_of_the_process() -> None:
    with stop_on_signal() as stop:
        stop.began -= 100
        with pytest.raises(Interrupted), stop.limited(99, "--stop-after 99"):
            time.sleep(30)


def test_a_time_limit_is_forgotten_with_its_context() -> None:
    with stop_on_signal() as stop:
        with stop.limited(0.05, "--stop-after 1s"):
            pass
        time.sleep(0.2)
        assert not stop


def test_a_thread_that_may_not_watch_signals_goes_without() -> None:
    def work() -> bool:
        with stop_on_signal() as stop:
            return bool(stop)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(work).result() is False


def test_a_time_limit_is_there_in_any_thread() -> None:
    def work() -> str | None:
        with stop_on_signal() as stop, stop.limited(0.05, "--stop-after 1s"):
            until(lambda: bool(stop))
            return stop.name

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(work).result() == "--stop-after 1s"


def test_watching_signals_needs_no_libraries() -> None:
    code = "import sys, pipeline.entry; print(*{'typer', 'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_begins_unmade() -> None:
    stop = StopRequest()
    stop.check()
    assert (bool(stop), stop.manner, stop.saving()) == (False, "raise", False)
