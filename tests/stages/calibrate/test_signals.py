"""Signals as a request to stop."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.calibrate.signals import stop_on_signal


def test_the_first_signal_asks_and_the_second_acts() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert (bool(stop), stop.name) == (True, "SIGINT")
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_that_may_not_watch_signals_goes_without() -> None:
    def work() -> bool:
        with stop_on_signal() as stop:
            return bool(stop)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(work).result() is False
