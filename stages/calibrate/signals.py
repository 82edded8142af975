"""SIGINT and SIGTERM become a request to stop at the next step, so that the work so far can be committed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Set by a signal. name: that of the signal, None until one came."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the context the first SIGINT or SIGTERM only sets the request; a second one acts as it did
    before. Python lets only the main thread watch signals: in another one no request ever comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {}

    def handler(number: int, _frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        for known, previous in before.items():
            signal.signal(known, previous)

    for watched in (signal.SIGINT, signal.SIGTERM):
        before[watched] = signal.signal(watched, handler)
    try:
        yield request
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
