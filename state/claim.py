"""Begin a run: claim its place, then make it there."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from state.durable import Disk
from state.errors import InputError
from state.identity import tokens_digest
from state.paths import HEAD, HEADS, LOCK, RECORD, ZARR
from state.record import RunRecord
from state.recovery import published, refuse_lost_heads
from state.remove import finish_cut_short
from state.store import RunWriter
from state.writing import all_writing

MAY_BE_BEGUN = frozenset({LOCK, HEADS, ZARR, RECORD, f"{HEAD}.tmp"})
"""What a creation that was cut short can have left."""


def create_run(
    path: Path | str, record: RunRecord, tokens: NDArray[np.int32], disk: Disk | None = None
) -> RunWriter:
    """Make a new run with its tokens and no statistics yet, in place of what a creation cut short left.

    Args:
        tokens: int32 [windows, seq], with the digest that `record.identity` has.

    Raises:
        InputError, RunBusy, OutOfSpace: see `Claim`.
    """
    with Claim(path, disk) as claim:
        return claim.create(record, tokens)


class Claim:
    """Holds the lock of a run that does not exist yet, so that a second process is refused before it begins.

    A context manager; `create` hands the lock on to the writer. Left without it, nothing stays behind.

    Raises (on entering):
        InputError: the run exists, or the folder holds files that no creation of ours has written.
        DamagedStore: the folder holds a run whose heads are lost.
        RunBusy, OutOfSpace: see `Disk`.
    """

    def __init__(self, path: Path | str, disk: Disk | None = None) -> None:
        self.path, self.disk = Path(path), disk or Disk()
        self._held = ExitStack()
        self._made: os.stat_result | None = None  # the folder, where it is new

    def __enter__(self) -> Self:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file. Choose another name for the run.")
        if not published(self.path, self.disk):
            refuse_lost_heads(self.path, self.disk)
            self._refuse_foreign()
        new = not self.path.exists()
        with ExitStack() as held:
            held.enter_context(self.disk.lock(self.path / LOCK))
            if published(self.path, self.disk):
                raise InputError(f"{self.path} exists already. Resume it, or choose another name.")
            self._held = held.pop_all()
        self._made = self.path.stat() if new else None
        return self

    def create(self, record: RunRecord, tokens: NDArray[np.int32]) -> RunWriter:
        """Make the run, with its tokens and no statistics yet; see `create_run`."""
        if tokens.dtype != np.int32 or tokens.ndim != 2 or tokens_digest(tokens) != record.identity.tokens:
            raise ValueError("tokens must be int32 [windows, seq] and those of record.identity")
        finish_cut_short(self.path, (), -1, self.disk)
        self._made = None
        return RunWriter.begin(self.path, self.disk, record, tokens, self._held.pop_all())

    def _refuse_foreign(self) -> None:
        """Raise InputError where a file is in the folder that the record of a creation cut short does not
        name.
        """
        present = set(self.disk.list(self.path))
        if not present - {LOCK}:
            return
        if not (foreign := present - MAY_BE_BEGUN):
            records = all_writing(self.path, self.disk.list(self.path / HEADS), self.disk)
            named = {
                path for record in records if record.number == 0 for path in (record.path, *record.files)
            }
            files = (file for file in self.path.rglob("*") if file.is_symlink() or not file.is_dir())
            foreign = {file.relative_to(self.path).as_posix() for file in files} - named - {LOCK}
        if foreign:
            raise InputError(
                f"{self.path} holds other files ({min(foreign)}), which no creation of Holdfast has written. "
                "Choose an empty or new folder for the run."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Unlinked while still locked: whoever waits for this file finds it has no name.
        with suppress(OSError):
            if self._made is not None and os.path.samestat(self._made, self.path.stat()):
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self._held.close()
