"""Notices when a run's folder is moved or deleted while it is being written.

A path is looked up anew at every operation, so that a commit would begin a second, incomplete run under
the old name.
"""

import os
from pathlib import Path

from state.durable import Disk
from state.errors import InputError


class Place:
    """A folder as it was when this was made: it is held open, and its name is compared with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        """Raises InputError when the name no longer leads to the folder."""
        opened = os.fstat(self._descriptor)
        try:
            named = self.path.stat()
        except FileNotFoundError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise InputError(
                f"{self.path} was {self._fate(opened.st_nlink)} while it was being written. Nothing was "
                f"written under the old name; what was committed is in the folder where it is now. Move it "
                f"back to {self.path}, or give the same command with its new name."
            )

    def close(self) -> None:
        os.close(self._descriptor)

    def _fate(self, links: int) -> str:
        try:
            now = Path(f"/proc/self/fd/{self._descriptor}").readlink()
        except OSError:
            return "deleted" if links == 0 else "moved away"
        return "deleted" if links == 0 else f"moved to {now}"


class PlacedDisk(Disk):
    """A Disk that changes nothing any more once a folder has left its place."""

    def __init__(self) -> None:
        self._place: Place | None = None

    def stay_at(self, path: Path) -> None:
        """From now on the folder that is at `path` must stay there."""
        self.leave()
        self._place = Place(path)

    def leave(self) -> None:
        """Nothing has to stay any more."""
        if self._place is not None:
            self._place.close()
            self._place = None

    def before(self, operation: str, path: Path) -> None:
        """See `Disk`."""
        self.check()

    def check(self) -> None:
        """Raises InputError when the folder has left its place."""
        if self._place is not None:
            self._place.check()
