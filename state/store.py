"""The writer of a run: begin, resume, commit.

    runs/NAME/
      HEAD                    pointer; the only file ever replaced
      heads/000012.json       one per commit, immutable
      calibration.zarr/       tokens/, g000012/ (statistics), solutions/SOLVER/LAYER/
      run.json, events.jsonl  for people

Published bytes are never overwritten: a commit writes new files, fsyncs them and their directories, then the
head, then HEAD. The two newest generations stay.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from state.durable import Disk
from state.errors import OutOfSpace
from state.head import HEAD, HEADS, Cursor, Head
from state.identity import Environment
from state.objects import ZARR, ObjectWriter, read_object
from state.record import RunRecord
from state.recovery import Found, collect, find_head, older_heads, retained
from state.update import Update, check_update, put_update

LOCK = ".lock"
RECORD = "run.json"
EVENTS = "events.jsonl"
TOKENS_PER_CHUNK = 2**22


class RunWriter:
    """The one writer of a run; holds the run's lock until closed. Get one by `create_run` of
    state/claim.py, or by `resume`.

    Attributes:
        path: the run.
        record: content of `run.json`.
        head: the newest commit.
        notes: what recovery found damaged and passed over, in words; empty if nothing was.
    """

    def __init__(self, path: Path, disk: Disk, record: RunRecord, held: ExitStack) -> None:
        self.path = path
        self.disk = disk
        self.record = record
        self.head: Head
        self.notes: tuple[str, ...] = ()
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
            objects = ObjectWriter(path, disk)
            encoded = record.encode()
            with _needing(tokens.nbytes + len(encoded)):
                objects.put(RECORD, encoded)
                objects.group("")
                windows_per_chunk = max(1, TOKENS_PER_CHUNK // max(tokens.shape[1], 1))
                objects.array(
                    "tokens",
                    tokens,
                    fill=-1,
                    axes=("window", "position"),
                    chunks=(min(windows_per_chunk, max(tokens.shape[0], 1)), tokens.shape[1]),
                )
                writer._publish(objects, Cursor(), finished=False, generation=None)
            writer.event("created")
        return writer

    @classmethod
    def resume(cls, path: Path | str, disk: Disk | None = None) -> "RunWriter":
        """Go on with a run at its newest whole commit, after deleting what no commit names.

        Raises:
            InputError: not a run, or of a newer format.
            DamagedStore: no commit is whole.
            RunBusy, OutOfSpace: see `Disk`.
        """
        path, disk = Path(path), disk or Disk()
        find_head(path, disk, verify=False)
        with ExitStack() as held:
            held.enter_context(disk.lock(path / LOCK))
            found = find_head(path, disk, verify=True)
            record = RunRecord.decode(read_object(path, RECORD, found.head.objects[RECORD], disk))
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
        group = f"g{self._next_number:06d}" if update.generation else self.head.generation
        objects = ObjectWriter(self.path, self.disk)
        with _needing(update.nbytes):
            put_update(objects, update, group, self.head)
            head = self._publish(objects, update.cursor, update.finished, group)
        self._usable = True
        self.event(
            "committed",
            number=head.number,
            cursor=head.cursor.model_dump(),
            finished=head.finished,
            seconds=round(time.monotonic() - started, 3),
        )
        return head

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
        # A kill may have left HEAD visible but not durable; what is reported from here on must stay true.
        self.disk.sync([self.path / HEADS, self.path])
        self.notes = found.notes
        self._accepted = found.head.accepted_environments
        self._next_number = found.last_number + 1
        self._heads = retained([found.head, *older_heads(self.path, self.disk, found.head.number)])
        self.head = found.head
        collect(self.path, self._heads, self.disk)
        if found.notes:
            # A new number for an old generation: one that was published before is never used again.
            unchanged = ObjectWriter(self.path, self.disk)
            self._publish(unchanged, found.head.cursor, found.head.finished, found.head.generation)
        self._mend_events()
        for note in found.notes:
            self.event("recovered", note=note)

    def _mend_events(self) -> None:
        try:
            torn = not self.disk.read(self.path / EVENTS).endswith(b"\n")
        except FileNotFoundError:
            return
        if torn:
            self.disk.append(self.path / EVENTS, b"\n")

    def _publish(self, objects: ObjectWriter, cursor: Cursor, finished: bool, generation: str | None) -> Head:
        first = not self._heads
        kept = {} if first else _lasting(self.head, generation)
        named = kept | objects.objects
        head = Head.of(self._next_number, cursor, finished, generation, self._accepted, named)
        objects.sync()
        self.disk.put(self.path / head.path, head.encode())
        self.disk.sync([self.path / HEADS, self.path])
        if first:
            self.disk.sync(parent for parent in self.path.absolute().parents if _may_hold_new_entries(parent))
        self.disk.publish(self.path / HEAD, head.pointer)
        self.head = head
        self._next_number = head.number + 1
        before, self._heads = [head, *self._heads], retained([head, *self._heads])
        dropped = [old for old in before if old not in self._heads]
        # Heads first: a head without its objects is damage, objects without a head are leftovers.
        for old in dropped:
            self.disk.delete(self.path / old.path)
        kept_groups = {one.generation for one in self._heads}
        for group in {old.generation for old in dropped if old.generation} - kept_groups:
            self.disk.delete(self.path / ZARR / str(group))
        return head


def _lasting(head: Head, generation: str | None) -> dict[str, str]:
    """The objects of `head` that a head of `generation` names too: all but another one's statistics."""
    replaced = f"{ZARR}/{head.generation}/" if head.generation != generation else None
    return {
        path: seen for path, seen in head.objects.items() if replaced is None or not path.startswith(replaced)
    }


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
