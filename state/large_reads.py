"""Reading files in large pieces, each into memory that is given: nothing is mapped, nothing is read twice."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from state.durable import patiently
from state.errors import InputError


class LargeReads:
    """Files that stay open while parts of them are read. Leave it as a context; one thread at a time."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, path: Path, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a file from `start` on.

        Raises:
            InputError: the file is gone, may not be read, or ends before.
            Unreadable: the device can't give them now, after several attempts.
        """
        try:
            patiently(path, lambda: self._read(path, start, into))
        except OSError as error:
            raise InputError(f"{path} can't be read any more: {error.strerror}") from error

    def _read(self, path: Path, start: int, into: memoryview) -> None:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        done = 0
        while done < len(into):
            read = os.preadv(self._open[path], [into[done:]], start + done)
            if not read:
                raise InputError(
                    f"{path} was cut short while it was worked from; give the same command again"
                )
            done += read
