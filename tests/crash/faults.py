"""What can go wrong at an operation, and the watcher that makes it go wrong at a chosen one."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.crash.interposer import READS, Seen
from tests.crash.powercut import Durable
from tests.crash.strata import stratum_of

ALLOCATES = frozenset({"create", "write", "mkdir", "rename", "sync"})
"""Operations that want space."""

OF_BYTES = frozenset({"open", "read", "create", "empty", "change", "write", "sync"})
"""Operations that a bad sector stops; a bad inode stops the others too."""

FATAL = ("kill before", "kill after", "tear")
CUTS = ("power cut", "power cut, names kept")
ERRORS = ("ENOSPC", "EIO once", "EIO for good", "EROFS")


def faults_of(operation: str, size_matters: bool = True) -> tuple[str, ...]:
    """The faults that are worth trying at an operation.

    A kill ahead of a read leaves what the one ahead of the next change leaves, so reads only fail.
    """
    if operation in READS:
        return ("EIO once", "EIO for good")
    faults = ["kill before", "kill after", *CUTS, "EIO once", "EIO for good", "EROFS"]
    if operation == "write" and size_matters:
        faults.append("tear")
    if operation in ALLOCATES:
        faults.append("ENOSPC")
    return tuple(faults)


@dataclass(frozen=True)
class Fault:
    """`kind`, at occurrence `number` (from 0) of the operations of a stratum. `seed` decides what a power
    cut keeps."""

    kind: str
    stratum: str
    number: int
    seed: int = 0


class Striking:
    """A watcher that lets a fault strike; what it did is noted in the file `mark`, which is in no root.
    What a power cut leaves is in the folder `mark`.left."""

    def __init__(self, fault: Fault, trial: Path, mark: Path) -> None:
        self._fault, self._trial, self._mark = fault, trial, mark
        self._left = fault.number
        self._struck: Seen | None = None
        self._lock = threading.RLock()
        self._durable = Durable(trial) if fault.kind in CUTS else None
        self._pending: Seen | None = None

    def before(self, seen: Seen, half: Callable[[], object] | None) -> None:
        """Let it strike where the operation is the chosen one, or where it lasts."""
        with self._lock:
            if self._struck is not None:
                self._last(seen)
                return
            if stratum_of(seen, self._trial) != self._fault.stratum:
                return
            self._left -= 1
            if self._left >= 0:
                return
            self._struck = seen
            self._note(f"{seen.operation} {seen.path}")
            self._strike(seen, half)

    def after(self, seen: Seen) -> None:
        """Die after the chosen operation, where that is the fault."""
        if self._durable is not None:
            self._durable.done(seen)
        if self._fault.kind == "kill after" and self._pending is seen:
            os.kill(os.getpid(), signal.SIGKILL)

    def _strike(self, seen: Seen, half: Callable[[], object] | None) -> None:
        kind = self._fault.kind
        if kind == "kill after":
            self._pending = seen
            return
        if kind == "tear" and half is not None:
            half()
        if self._durable is not None:
            self._durable.leave(left_by_cut(self._mark), None if kind == "power cut" else self._fault.seed)
        if kind in (*FATAL, *CUTS):
            os.kill(os.getpid(), signal.SIGKILL)
        self._fail({"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}.get(kind, errno.EIO), seen)

    def _last(self, seen: Seen) -> None:
        """What comes after an error: a full disk stays full, a bad sector bad."""
        kind = self._fault.kind
        if kind == "ENOSPC" and seen.operation in ALLOCATES:
            self._fail(errno.ENOSPC, seen)
        if kind == "EROFS" and seen.operation not in READS and not seen.operation.startswith("sync"):
            self._fail(errno.EROFS, seen)
        if kind == "EIO for good" and self._struck is not None and stays_bad(self._struck, seen):
            self._fail(errno.EIO, seen)

    def _note(self, what: str) -> None:
        self._mark.write_text(what, encoding="utf-8")

    @staticmethod
    def _fail(number: int, seen: Seen) -> None:
        raise OSError(number, os.strerror(number), seen.path)


def left_by_cut(mark: Path) -> Path:
    """Where the watcher puts what is there after a power cut."""
    return mark.with_name(f"{mark.name}.left")


def stays_bad(struck: Seen, seen: Seen) -> bool:
    """Whether an operation fails as well where another one on its path met an error that lasts."""
    return seen.path == struck.path and (struck.operation not in OF_BYTES or seen.operation in OF_BYTES)


class BadPath:
    """A watcher under which operations on one path fail with an I/O error: those on its bytes if the
    operation that `struck` first was one, else all."""

    def __init__(self, struck: Seen) -> None:
        self._struck = struck

    def before(self, seen: Seen, half: object) -> None:
        """Fail."""
        if stays_bad(self._struck, seen):
            raise OSError(errno.EIO, os.strerror(errno.EIO), seen.path)

    def after(self, seen: Seen) -> None:
        """Nothing."""
