"""A file mapped into memory that is known by what the file system says of it, so that a file which changes
while it is worked from is noticed.
"""

import mmap
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from state.errors import Difference, IdentityMismatch, InputError


@dataclass(frozen=True)
class Stamp:
    """What a file system says of a file's content. Whatever writes to the file, or puts another in its place,
    changes one of these; `changed` also where somebody set the time of modification back.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: BinaryIO | Path) -> "Stamp":
        """Of an open file, or of what is at a path now."""
        found = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def __str__(self) -> str:
        times = (
            datetime.fromtimestamp(time / 1e9, UTC).isoformat() for time in (self.modified, self.changed)
        )
        return f"{self.size:,} bytes, modified {next(times)}, changed {next(times)}, inode {self.inode}"


@dataclass(frozen=True)
class MappedFile:
    """A file as it was when it was opened. data: its bytes, read-only; a write in place shows in them."""

    path: Path
    stamp: Stamp
    data: memoryview

    @classmethod
    def open(cls, path: Path) -> "MappedFile":
        """Map a file.

        Raises:
            InputError: it is empty, or can't be read.
        """
        stamp, data = _map(path, mmap.ACCESS_READ)
        return cls(path, stamp, data)

    @cached_property
    def private(self) -> memoryview:
        """Its bytes in a private mapping, for code that takes nothing but writable memory: what it writes is
        seen neither in `data` nor in the file. Nothing is copied until then.

        Raises:
            IdentityMismatch: there is another file at the path by now.
        """
        stamp, data = _map(self.path, mmap.ACCESS_COPY)
        self._require(stamp)
        return data

    def touched(self) -> "MappedFile | None":
        """The same file under the stamp it has now, where that differs in the time of change alone: another
        name or other permissions do that, and so does a write whose traces were removed. Only its bytes tell.
        """
        try:
            stamp = Stamp.of(self.path)
        except OSError:
            return None
        alike = stamp != self.stamp and replace(stamp, changed=self.stamp.changed) == self.stamp
        return replace(self, stamp=stamp) if alike else None

    def require_unchanged(self) -> None:
        """Raise IdentityMismatch where the file at the path is not the one that was opened, or was written to
        since.
        """
        try:
            self._require(Stamp.of(self.path))
        except OSError as error:
            raise self._changed(f"gone ({error.strerror})") from error

    def _require(self, stamp: Stamp) -> None:
        if stamp != self.stamp:
            raise self._changed(str(stamp))

    def _changed(self, current: str) -> IdentityMismatch:
        difference = Difference(str(self.path), str(self.stamp), current)
        return IdentityMismatch(
            f"{self.path} has changed while it was worked from:\n  {difference}\n"
            "What was committed before was made from the file as it was. Put that back and give the same "
            "command again, or leave it as it is now and begin anew with it",
            [difference],
        )


def _map(path: Path, access: int) -> tuple[Stamp, memoryview]:
    try:
        with path.open("rb") as file:
            return Stamp.of(file), memoryview(mmap.mmap(file.fileno(), 0, access=access))
    except ValueError as error:
        raise InputError(f"{path} is empty") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
