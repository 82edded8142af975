"""Repair a run: what recovery does, without giving up on heads that are lost or on files that stay
unreadable.
"""

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from state.aside import SetAside
from state.damage import broken_objects, in_few_words
from state.durable import Disk
from state.errors import DamagedStore, InputError, Unreadable
from state.events import read_events
from state.head import Cursor, Head
from state.identity import digest
from state.paths import (
    GENERATION,
    HEADS,
    LOCK,
    OBJECT,
    RECORD,
    RECORD_COPY,
    ZARR,
    head_path,
    refuse_links,
)
from state.recovery import Found, find_head, older_heads, published
from state.store import RunWriter

MEDIA_ERRORS = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""What a device says of bytes that are lost; other errors are about the moment."""

LONG_PAUSES = (1.0, 3.0)
"""Seconds between rounds of attempts to read a file before it counts as lost."""


class RepairDisk(Disk):
    """Reads more patiently, and takes what stays unreadable for damage: an OSError of the device in place of
    Unreadable.
    """

    def read(self, path: Path) -> bytes:
        """All bytes of a file; see `Disk.read`."""
        for pause in (*LONG_PAUSES, None):
            try:
                return super().read(path)
            except Unreadable as error:
                if error.number not in MEDIA_ERRORS:
                    raise
                if pause is None:
                    raise OSError(error.number, error.reason, str(path)) from error
                time.sleep(pause)
        raise AssertionError("unreachable")


def repair_run(run: Path, disk: Disk | None = None) -> RunWriter:
    """Rebuild the heads of a run from what is whole, and set aside what is not. Gives the writer, which
    holds the lock; its `notes` say what was found and done, its `missing` what is still damaged.

    Raises:
        InputError: there is no run.
        DamagedStore: nothing in it can be proved whole; nothing was changed.
        RunBusy, OutOfSpace: see `Disk`.
    """
    disk = disk or RepairDisk()
    if not (run / ZARR).is_dir():
        raise InputError(f"{run} is not a run; there is nothing to repair")
    refuse_links(run, [f"{HEADS}/any", f"{ZARR}/any"])
    with ExitStack() as held:
        held.enter_context(disk.lock(run / LOCK))
        rebuilt = _rebuild_newest(run, disk)
        if not published(run, disk):
            raise DamagedStore(
                f"{run}: HEAD and all heads are lost, and the log names no commit that the files there are. "
                "Nothing was touched. Restore heads/ from a copy, or calibrate into a new run: "
                "`holdfast calibrate MODEL DATA NEW_RUN`",
                [HEADS],
            )
        found = _with_older(run, find_head(run, disk, verify=True), disk)
        writer = RunWriter.at(run, disk, found, held.pop_all())
    writer.notes = (*rebuilt, *writer.notes)
    return writer


def _with_older(run: Path, found: Found, disk: Disk) -> Found:
    """What was found, with older commits whose statistics are damaged: they are kept to fall back to
    alone.
    """
    for older in older_heads(run, disk, found.recorded.number):
        statistics = older.model_copy(update={"objects": older.statistics})
        if faults := broken_objects(run, statistics, disk):
            note = f"the older commit {older.number}: {in_few_words(faults)}; nothing newer needs it"
            found = replace(found, notes=(*found.notes, note), passed_over=(*found.passed_over, older))
    return found


def _rebuild_newest(run: Path, disk: Disk) -> tuple[str, ...]:
    """Write the head of the newest commit that the log knows, if all heads since are lost and its files are
    whole.

    The log has the digest of each head: a head made again from the files is that one, or is not written.
    """
    known = max((head.number for head in older_heads(run, disk, 10**18)), default=-1)
    if published(run, disk):
        with suppress(DamagedStore):
            known = max(known, find_head(run, disk, verify=False).head.number)
    notes: list[str] = []
    events = [event for event in read_events(run, disk) if isinstance(event.get("number"), int)]
    for event in sorted(events, key=lambda event: event["number"], reverse=True):
        if event["number"] <= known:
            break
        for head in _candidates(run, event, disk):
            if head.digest != event.get("head"):
                continue
            aside = SetAside(run, disk)
            aside.move(head.path)
            aside.sync()
            disk.put(run / head.path, head.encode())
            disk.sync([run / HEADS, run])
            made = f"{head_path(head.number)} was made again: the log has its digest, and all files are whole"
            return (*notes, made)
        notes.append(f"commit {event['number']}: its head is lost, and its files are not all whole")
    return ()


def _candidates(run: Path, event: Mapping[str, Any], disk: Disk) -> Iterator[Head]:
    """What the head of a commit in the log would be, from the files that are there."""
    generation = event.get("generation")
    if generation is not None and not (isinstance(generation, str) and GENERATION.fullmatch(generation)):
        return
    objects = {}
    for path in _object_files(run, generation):
        try:
            objects[path] = digest(disk.read(run / path))
        except OSError:
            return
    for record in (RECORD, RECORD_COPY):
        try:
            objects[RECORD] = digest(disk.read(run / record))
            said = {name: event[name] for name in ("accepted_environments", "solved_behind") if name in event}
            yield Head.of(
                event["number"],
                Cursor.model_validate(event["cursor"]),
                event["finished"],
                generation,
                Head.accepted(said.get("accepted_environments", ())),
                objects,
                said.get("solved_behind"),
            )
        except (OSError, KeyError, ValidationError):
            continue


def _object_files(run: Path, generation: str | None) -> list[str]:
    tops = ["tokens", "solutions", *([generation] if generation else [])]
    files = [run / ZARR / "zarr.json"]
    files += [file for top in tops for file in (run / ZARR / top).rglob("*") if file.is_file()]
    paths = (file.relative_to(run).as_posix() for file in files)
    return [path for path in paths if OBJECT.fullmatch(path)]
