"""What recovery passes over is set aside: moved to `RUN/set-aside/TIME/`, under the path it had, never
deleted.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from state.durable import Disk
from state.paths import SET_ASIDE, refuse_links
from state.remove import remove_empty_parents

REMADE = (
    "statistics that were lost came out otherwise when they were made again: the solutions made behind them "
    "are set aside in {folder}, and have to be made again"
)
OUTDATED = "solutions made behind others than there are now are set aside in {folder}, and are made again"


def set_aside(run: Path, paths: Iterable[str], disk: Disk) -> Path:
    """Set files of a run aside; durable on return. Returns the folder that they are in now."""
    aside = SetAside(run, disk)
    for path in paths:
        aside.move(path)
    aside.sync()
    return run / str(aside.folder)


class SetAside:
    """One recovery's folder of what it passed over; made when the first file moves there.

    Attributes:
        moved: paths relative to the run, as they were.
    """

    def __init__(self, run: Path, disk: Disk) -> None:
        self.run = run
        self.disk = disk
        self.moved: list[str] = []
        self._folder: str | None = None

    @property
    def folder(self) -> str | None:
        """Relative to the run; None while nothing was moved."""
        return self._folder

    def move(self, path: str) -> None:
        """Move one file, if it is there."""
        self.move_all([path])

    def move_all(self, paths: Iterable[str]) -> None:
        """Move all of the files that are there.

        All are looked at before the first is moved: where the device fails on one, the others are still
        together.
        """
        for path in [path for path in dict.fromkeys(paths) if self._exists(path)]:
            self.disk.move(self.run / path, self.run / self._place() / path)
            self.moved.append(path)

    def keep_copy(self, path: str) -> None:
        """Keep the bytes of a file that is about to be replaced in its place."""
        if self._exists(path):
            try:
                data = self.disk.read(self.run / path)
            except OSError:  # lost bytes can't be copied
                self.move(path)
            else:
                self.disk.put(self.run / self._place() / path, data)

    def sync(self) -> None:
        """Make it durable, and remove folders that are empty now."""
        if self._folder is None:
            return
        folders = {self.run / SET_ASIDE, self.run / self._folder}
        for path in self.moved:
            folders.update((self.run / self._folder / path).parents)
        inside = {folder for folder in folders if folder.is_relative_to(self.run)}
        self.disk.sync(sorted(inside, key=lambda folder: (-len(folder.parts), folder)))
        remove_empty_parents(self.run, self.moved, self.disk)

    def _exists(self, path: str) -> bool:
        refuse_links(self.run, [path])
        return (self.run / path).is_file() or (self.run / path).is_symlink()

    def _place(self) -> str:
        if self._folder is None:
            refuse_links(self.run, [f"{SET_ASIDE}/any"])
            time = f"{SET_ASIDE}/{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            taken, number = time, 1
            while (self.run / taken).exists():
                number += 1
                taken = f"{time}-{number}"
            self._folder = taken
        return self._folder
