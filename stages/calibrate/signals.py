"""A request to stop, made by a signal or a time limit, and what it does at each moment of the work.

Where a process has nothing of its own to save, as while it loads libraries or a model, the request is raised
as `Interrupted`. Where it has, the request is only noted, and the work ends itself after the step under way.
"""

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; what ends a job; a terminal or shell that closes; what schedulers send ahead of their limit."""

Manner = Literal["raise", "raise once", "wait", "end"]
"""raise: `Interrupted`, at every signal. raise once: the same, and then wait. wait: the work stops itself,
and takes the time it needs. end: nothing is raised, since the process is ending anyway.
"""


class Interrupted(BaseException):
    """A signal came where there was nothing to save first; the text is the signal's name.

    No subclass of Exception, and not KeyboardInterrupt either: libraries handle both in ways of their own.
    """


class StopRequest:
    """Whether this process has been asked to stop.

    Attributes:
        name: of the signal, or of the time limit; None until one came.
        began: when the process was first ready to be asked; time limits count from here.
        manner: what a signal does now.
        saving: whether progress is being written just now, so that the process must not be cut off.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.began = time.monotonic()
        self.manner: Manner = "raise"
        self.saving: Callable[[], bool] = bool

    def __bool__(self) -> bool:
        return self.name is not None

    def check(self) -> None:
        """Raise Interrupted if a request was made: a library may have swallowed what was raised then."""
        if self.name is not None:
            raise Interrupted(self.name)

    def end(self) -> None:
        """The process ends from here on. After a request no signal changes the exit code any more, not even
        once the interpreter has given up its handlers.
        """
        self.manner = "end"
        if self:
            for number in _heeded():
                signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def waiting(self, saving: Callable[[], bool]) -> Iterator[None]:
        """Within it signals raise nothing: the work looks at the request and stops itself.

        Two resources can't be left safely while exceptions may come at any instruction, `with` or not: enter
        this context before whatever must be waited for.
        """
        self.saving, self.manner = saving, "wait"
        try:
            yield
        finally:
            self.saving, self.manner = bool, "raise"

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `waiting`: a stretch of work that is lost anyway when the process stops, so that the first
        signal raises Interrupted.
        """
        self.manner = "raise once"
        try:
            self.check()
            yield
        finally:
            self.manner = "wait"

    @contextmanager
    def limited(self, seconds: float, name: str) -> Iterator[None]:
        """Within it the request makes itself once the process is `seconds` old, under this name."""
        left = max(0.0, seconds - (time.monotonic() - self.began))
        timer = threading.Timer(left, self._expire, (name,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self, name: str) -> None:
        self.name = self.name or name
        if self.manner in ("raise", "raise once"):
            _thread.interrupt_main(signal.SIGTERM)  # does nothing where SIGTERM is not watched

    def signalled(self, number: int, _frame: FrameType | None) -> None:
        """The handler of every signal that is watched."""
        self.name = self.name or signal.Signals(number).name
        manner = self.manner
        if manner == "raise once":
            self.manner = "wait"
        if manner in ("raise", "raise once"):
            raise Interrupted(self.name)


_watching: StopRequest | None = None
"""The request that this process's signals go to; signal handlers are the process's too."""


def watch_signals() -> StopRequest:
    """Let this process's signals make a request to stop, from here to its end. For the main thread.

    A signal that is ignored stays ignored, as under `nohup`.
    """
    global _watching
    _watching = StopRequest()
    for number in _heeded():
        signal.signal(number, _watching.signalled)
    return _watching


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the context signals make a request to stop: the one watched for already, if there is one.

    Python lets only the main thread watch signals: in another one no request comes from them.
    """
    global _watching
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    if _watching is not None:
        yield _watching
        return
    before = {number: signal.getsignal(number) for number in _heeded()}
    try:
        yield watch_signals()
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        _watching = None


def _heeded() -> list[signal.Signals]:
    return [number for number in WATCHED if signal.getsignal(number) not in (signal.SIG_IGN, None)]
