"""Commit behind the forward pass, in a thread of the process that holds the lock."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from state.head import Head
from state.store import RunWriter
from state.update import Update


class BackgroundWriter:
    """Commits one update at a time in a thread. Nothing is copied: an update's arrays must not change.

    Args:
        writer: the run; nobody else may commit meanwhile.
        committed: called in the thread after each commit with its head and the seconds it took.
    """

    def __init__(self, writer: RunWriter, committed: Callable[[Head, float], None] | None = None) -> None:
        self._writer = writer
        self._committed = committed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[Head] | None = None

    @property
    def busy(self) -> bool:
        """Whether a commit is being written."""
        return self._pending is not None and not self._pending.done()

    def submit(self, update: Update) -> None:
        """Start a commit, after waiting for the one before.

        Raises:
            HoldfastError: the commit before failed; this one is not started.
        """
        self.wait()
        self._pending = self._thread.submit(self._commit, update)

    def wait(self) -> Head:
        """Wait for the commit in flight, if any, and give the newest head.

        Raises:
            HoldfastError: that commit failed.
        """
        if self._pending is None:
            return self._writer.head
        wait([self._pending])
        pending, self._pending = self._pending, None
        return pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_finish()
        if error is None:
            self.wait()

    def _let_finish(self) -> None:
        """Wait for the commit in flight, however often the wait is interrupted: whoever leaves this context
        frees the run's lock next, and nobody may write without it.
        """
        interruption: BaseException | None = None
        while self.busy and self._pending is not None:
            try:
                wait([self._pending])  # not the thread: a join that is interrupted takes it for ended
            except BaseException as error:  # a signal handler's
                interruption = error
        self._thread.shutdown(wait=True)
        if interruption is not None:
            raise interruption

    def _commit(self, update: Update) -> Head:
        started = time.monotonic()
        head = self._writer.commit(update)
        if self._committed is not None:
            self._committed(head, time.monotonic() - started)
        return head
