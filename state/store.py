"""The writer of a run: begin, resume, commit.

    runs/NAME/
      HEAD                    name, digest and content of the head that counts; the only file ever replaced
      heads/000012.json       one per commit, immutable
      heads/000013.writing    while commit 13 is written: the files it is made of
      heads/run.json          a copy of run.json
      calibration.zarr/       tokens/, g000012/ (statistics), solutions/SOLVER/LAYER/
      run.json, events.jsonl  for people
      set-aside/TIME/         what recovery passed over

Published bytes are never overwritten: a commit names the files it is about to write, writes them, fsyncs
them and their directories, then the head, then HEAD. The two newest generations stay. Only files that a
record or a head names are removed.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from state.aside import OUTDATED, REMADE, set_aside
from state.durable import Disk
from state.errors import DamagedStore, OutOfSpace
from state.events import newest_commit, read_events
from state.head import Cursor, Head
from state.identity import Environment
from state.mend import free_number, mend, restore
from state.objects import SOLUTIONS, EncodedObjects, ObjectWriter, read_object, solution_files
from state.paths import EVENTS, HEAD, HEADS, LOCK, RECORD, RECORD_COPY, ZARR, head_path, refuse_links
from state.record import RunRecord
from state.recovery import Found, find_head, retained
from state.remove import drop
from state.update import Update, check_update, planned_files, put_tokens, put_update, token_files
from state.writing import Writing


class RunWriter:
    """The one writer of a run; holds the run's lock until closed. Get one by `create_run` of
    state/claim.py, or by `resume`.

    Attributes:
        path: the run.
        record: content of `run.json`.
        head: the newest commit.
        notes: what recovery found damaged and passed over, in words; empty if nothing was. A commit adds to
        them
            where solutions turn out to be of other statistics.
    """

    def __init__(self, path: Path, disk: Disk, record: RunRecord, held: ExitStack) -> None:
        self.path = path
        self.disk = disk
        self.record = record
        self.head: Head
        self.notes: tuple[str, ...] = ()
        self.missing: tuple[str, ...] = ()
        self._heads: list[Head] = []
        self._next_number = 0
        self._accepted: tuple[Environment, ...] = ()
        self._usable = True
        self._held = held

    @classmethod
    def begin(
        cls, path: Path, disk: Disk, record: RunRecord, tokens: NDArray[np.int32], held: ExitStack
    ) -> "RunWriter":
        """Write the first commit of a new run, its record and tokens, at a place whose lock `held` holds."""
        writer = cls(path, disk, record, held)
        with _closed_on_error(writer):
            objects, encoded = ObjectWriter(path, disk), record.encode()
            with _needing(tokens.nbytes + 2 * len(encoded)):
                files = [RECORD, RECORD_COPY, f"{ZARR}/zarr.json", *token_files(tokens)]
                with writer._writing(files):
                    disk.put(path / RECORD_COPY, encoded)
                    objects.put(RECORD, encoded)
                    objects.group("")
                    put_tokens(objects, tokens)
                    writer._publish(objects, Cursor(), finished=False, generation=None)
            writer.event("created", **writer.head.in_the_log)
        return writer

    @classmethod
    def resume(cls, path: Path | str, disk: Disk | None = None) -> "RunWriter":
        """Go on with a run at its newest whole commit, after removing what commits that were cut short left.

        Raises:
            InputError: not a run, or of a newer format.
            Unreadable: the device can't give a file now; nothing was changed.
            DamagedStore: no commit is whole, or the newest can't be told.
            RunBusy, OutOfSpace: see `Disk`.
        """
        path, disk = Path(path), disk or Disk()
        find_head(path, disk, verify=False)
        refuse_links(path, [f"{HEADS}/any", f"{ZARR}/any"])
        with ExitStack() as held:
            held.enter_context(disk.lock(path / LOCK))
            found = find_head(path, disk, verify=True)
            _refuse_to_forget(path, found, disk)
            return cls.at(path, disk, found, held.pop_all())

    @classmethod
    def at(cls, path: Path, disk: Disk, found: Found, held: ExitStack) -> "RunWriter":
        """Go on at the commit that was found; `held` holds the run's lock."""
        with held:
            digest = found.head.objects[RECORD]
            record = RunRecord.decode(read_object(path, RECORD, digest, disk))
            writer = cls(path, disk, record, held.pop_all())
        with _closed_on_error(writer):
            writer._recover(found)
        return writer

    def commit(self, update: Update) -> Head:
        """Write and publish one commit. On return it survives a crash or a power cut.

        After an error nothing of it counts and the writer is of no more use: resume the run.

        Raises:
            OutOfSpace: the commits before are intact.
            ValueError: the arrays do not fit the layout, or a solution exists already.
        """
        if not self._usable:
            raise RuntimeError("this writer is closed or a commit has failed: resume the run")
        started = time.monotonic()
        check_update(update, self.head)
        self._usable = False
        self._next_number = free_number(self.path, self._next_number, self.disk)
        group = f"g{self._next_number:06d}" if update.generation else self.head.generation
        objects = ObjectWriter(self.path, self.disk)
        with _needing(update.nbytes), self._writing(planned_files(update, group, self.head)):
            put_update(objects, update, group, self.head)
            if outdated := solution_files(self.head.objects, update.outdated):
                kept = self._without(outdated, self.head.objects, OUTDATED)
                self.head = self.head.model_copy(update={"objects": kept})
            head = self._publish(objects, update.cursor, update.finished, group)
        self._usable = True
        seconds = round(time.monotonic() - started, 3)
        self.event("committed", **head.in_the_log, seconds=seconds)
        return head

    def restore_tokens(self, tokens: NDArray[np.int32]) -> None:
        """Write the run's tokens again where they are damaged; does nothing for other tokens, or whole
        ones.
        """
        if not self.missing:
            return
        encoded = EncodedObjects(self.path, self.disk)
        put_tokens(encoded, tokens)
        restored = restore(self.path, encoded.data, self.head.objects, self.disk)
        self.missing = tuple(path for path in self.missing if path not in restored)
        for path in restored:
            self.event("restored", object=path)

    def accept_environment(self, environment: Environment) -> None:
        """Record in all later commits that a part is done in another environment than the record's."""
        if environment not in (self.record.environment, *self._accepted):
            self._accepted += (environment,)

    def event(self, kind: str, **facts: Any) -> None:
        """Add a line to `events.jsonl`, with the time."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **facts}
        self.disk.append(self.path / EVENTS, json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Free the lock."""
        self._usable = False
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recover(self, found: Found) -> None:
        mended = mend(self.path, found, self.disk)
        self.notes, self.missing = mended.notes, mended.missing
        self._accepted = found.head.accepted_environments
        self._heads = mended.heads
        self.head = found.recorded
        self._next_number = free_number(self.path, found.last_number + 1, self.disk)
        if mended.damaged:
            # A new number for an old generation: one that was published before is never used again.
            self.head = found.recorded.model_copy(
                update={"objects": mended.objects, "solved_behind": mended.solved_behind}
            )
            unchanged = ObjectWriter(self.path, self.disk)
            with self._writing([]):
                self._publish(unchanged, found.head.cursor, found.head.finished, found.head.generation)
        self._mend_events()
        for note in self.notes:
            self.event("recovered", note=note, **self.head.in_the_log)

    @contextmanager
    def _writing(self, files: Sequence[str]) -> Iterator[None]:
        """Say durably what the next commit writes, until it is published."""
        number = self._next_number
        record = Writing(number, (f"{HEAD}.tmp", head_path(number), *files))
        record.begin(self.path, self.disk)
        if not self._heads:  # the run itself is new, and maybe folders it lies in
            parents = self.path.absolute().parents
            self.disk.sync([self.path, *(parent for parent in parents if _may_hold_new_entries(parent))])
        yield
        record.end(self.path, self.disk)

    def _mend_events(self) -> None:
        try:
            torn = not self.disk.read(self.path / EVENTS).endswith(b"\n")
        except OSError:
            return
        if torn:
            self.disk.append(self.path / EVENTS, b"\n")

    def _publish(self, objects: ObjectWriter, cursor: Cursor, finished: bool, generation: str | None) -> Head:
        first = not self._heads
        kept = {} if first else _lasting(self.head, generation)
        behind = None if first else self.head.solved_behind
        if finished and behind is not None:
            made = Head.of(0, cursor, finished, generation, (), kept | objects.objects).statistics_digest
            if made != behind:
                kept = self._without([path for path in kept if path.startswith(SOLUTIONS)], kept, REMADE)
            behind = None
        named = kept | objects.objects
        head = Head.of(self._next_number, cursor, finished, generation, self._accepted, named, behind)
        objects.sync()
        self.disk.put(self.path / head.path, head.encode())
        self.disk.sync([self.path / HEADS, self.path])
        self.disk.publish(self.path / HEAD, head.pointer)
        self.head = head
        self._next_number = head.number + 1
        before, self._heads = [head, *self._heads], retained([head, *self._heads])
        drop(self.path, [old for old in before if old not in self._heads], self._heads, self.disk)
        return head

    def _without(self, lost: Sequence[str], objects: dict[str, str], why: str) -> dict[str, str]:
        """Set aside solutions that the next head names no more. Returns the objects that are left."""
        note = why.format(folder=set_aside(self.path, lost, self.disk))
        self.notes += (note,)
        self.event("set aside", note=note)
        gone = set(lost)
        return {path: seen for path, seen in objects.items() if path not in gone}


def _lasting(head: Head, generation: str | None) -> dict[str, str]:
    """The objects of `head` that a head of `generation` names too: all but another one's statistics."""
    replaced = f"{ZARR}/{head.generation}/" if head.generation != generation else None
    return {
        path: seen for path, seen in head.objects.items() if replaced is None or not path.startswith(replaced)
    }


def _refuse_to_forget(run: Path, found: Found, disk: Disk) -> None:
    """Raise DamagedStore where HEAD is lost and the log knows of a newer commit than all heads."""
    if not found.broken_pointer:
        return
    newest = newest_commit(read_events(run, disk))
    if newest is not None and newest > found.recorded.number:
        raise DamagedStore(
            f"{run}: HEAD and the head of commit {newest} are lost; the newest that is left is commit "
            f"{found.recorded.number}. Nothing was touched: `holdfast repair {run}` looks for what is whole.",
            [HEAD, head_path(newest)],
        )


def _may_hold_new_entries(directory: Path) -> bool:
    return os.access(directory, os.W_OK)


@contextmanager
def _needing(nbytes: int) -> Iterator[None]:
    """Let OutOfSpace say what the whole operation needs, not only the file it failed at."""
    try:
        yield
    except OutOfSpace as error:
        raise OutOfSpace(error.path, max(nbytes, error.needed), error.free, error.reason) from error


@contextmanager
def _closed_on_error(writer: RunWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.close()
        raise
