"""Work that flows: one thread makes what there is to do, others do it, and whoever asked takes what comes of
it, in order. What is on the way is bounded by its size.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Condition, Thread
from typing import TypeVar

Asked = TypeVar("Asked")
Got = TypeVar("Got")


class _Room:
    """Bytes that may be on the way; something larger than all of it goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._closed = limit, 0, False
        self._changed = Condition()

    def take(self, nbytes: int) -> bool:
        """Wait for room; False where there will be none any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._taken or self._taken + nbytes <= self._limit
            )
            self._taken += nbytes
            return not self._closed

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._taken -= nbytes
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()


def in_order(
    asked: Iterator[Asked],
    do: Callable[[Asked], Got],
    size: Callable[[Asked], int],
    limit: int,
    workers: int,
    prepare: Callable[[], None],
) -> Generator[tuple[Asked, Got], None, None]:
    """What there is to do and what comes of it, in order; what either raises is raised here.

    Close it to leave early: then nothing more is begun, and what runs is waited for.

    Args:
        size: bytes that something takes from when it is asked for until the next is taken here.
        limit: of these bytes, besides those of what is asked for next.
        workers: threads that `do`. prepare: called once in each of them.
    """
    room = _Room(limit)
    coming: SimpleQueue[tuple[Asked, Future[Got]] | BaseException | None] = SimpleQueue()

    def ask() -> None:
        try:
            for one in asked:
                if not room.take(size(one)):
                    return
                coming.put((one, pool.submit(do, one)))
            coming.put(None)
        except BaseException as error:  # whatever it is, it is raised where it can be answered
            coming.put(error)

    with ThreadPoolExecutor(workers, "export", prepare) as pool:
        asking = Thread(target=ask, name="export-reading", daemon=True)
        asking.start()
        try:
            while (found := coming.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                one, future = found
                yield one, future.result()
                room.give(size(one))
        finally:
            room.close()
            pool.shutdown(wait=False, cancel_futures=True)
            asking.join()
