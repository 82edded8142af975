"""How a whole OUT.partial becomes OUT: by one rename, or file by file where OUT holds an older export.

Either way OUT has a mark from the first change to the last, so that nobody takes it for finished meanwhile,
and every step may be the last one before a kill: the next command goes on from what is there.

Files are exchanged one by one so that files of other people in OUT stay where they are. First the mark, which
names all that may be deleted or replaced; then the old export goes, what makes it loadable first; then the
new one comes, what makes it loadable last, then its records. So OUT never holds files of both.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stages.export.ownership import is_folder, make_parents, obstacles, remove_file, remove_owned
from stages.export.records import (
    IDENTITY,
    JOURNAL,
    MARK,
    WORK_FILES,
    WRITING,
    Mark,
    Written,
    encode_identity,
    encode_journal,
    encode_mark,
)
from state.durable import Disk
from state.errors import InputError


def publish_whole(disk: Disk, partial: Path, out: Path) -> None:
    """Make OUT.partial OUT where OUT is absent or empty."""
    for name in WORK_FILES:
        remove_file(disk, partial / name)
    disk.rename(partial, out)
    remove_mark(disk, out)


def exchange(
    disk: Disk,
    partial: Path,
    out: Path,
    identity: Mapping[str, str],
    journal: Mapping[str, Written],
    replaced: Sequence[Written],
) -> None:
    """Put the files of OUT.partial into OUT in place of those of an older export, or go on doing so.

    replaced: the files of the older export. Only those that are ours by name and size are deleted.

    Raises:
        InputError: a foreign file stands where one of the export belongs.
    """
    if not is_folder(out):
        disk.make_folder(out)
        disk.sync([out.parent])
    mark = Mark(out.name, tuple(dict.fromkeys((*replaced, *journal.values()))))
    _place(disk, partial, out, MARK, encode_mark(mark))
    for record in (JOURNAL, IDENTITY):
        remove_file(disk, out / record)
    files = [entry for entry in journal.values() if entry.file != IDENTITY]
    waiting = [entry for entry in files if os.path.lexists(partial / entry.file)]
    moved = {entry.file for entry in files} - {entry.file for entry in waiting}
    old = [entry for entry in replaced if entry.file not in moved]
    remove_owned(disk, out, sorted(old, key=_is_shard))
    for entry in sorted(waiting, key=_is_shard, reverse=True):
        refuse_obstacles(out, [entry.file], ())
        make_parents(disk, out, entry.file)
        disk.rename(partial / entry.file, out / entry.file)
    _place(disk, partial, out, IDENTITY, encode_identity(identity))
    _place(disk, partial, out, JOURNAL, encode_journal(journal))
    remove_partial(disk, partial, journal.values())
    remove_mark(disk, out)


def remove_partial(disk: Disk, partial: Path, entries: Iterable[Written]) -> None:
    """Remove what is ours in OUT.partial, the mark last: a rerun knows the rest by it. Foreign files stay."""
    remove_owned(disk, partial, [entry for entry in entries if entry.file != IDENTITY])
    for name in (*WORK_FILES, JOURNAL, IDENTITY):
        remove_file(disk, partial / name)
    disk.sync([partial])
    remove_file(disk, partial / MARK)
    if disk.remove_empty(partial):
        disk.sync([partial.parent])


def remove_mark(disk: Disk, out: Path) -> None:
    """The last act: from now on OUT is finished."""
    disk.remove(out / MARK)
    disk.sync([out])


def refuse_obstacles(folder: Path, names: Iterable[str], ours: Iterable[str]) -> None:
    """Raise InputError if foreign files stand where these names of an export belong."""
    if found := obstacles(folder, names, ours):
        raise InputError(
            f"{folder / found[0]} is not as Holdfast wrote it, or not Holdfast's, and the export needs its "
            f"place{_others(found[1:])}. Move it away, then give the same command again; or choose another "
            "OUT."
        )


def _others(names: Sequence[str]) -> str:
    return f" (so do {', '.join(names[:5])})" if names else ""


def _place(disk: Disk, partial: Path, out: Path, name: str, data: bytes) -> None:
    """A file of OUT in one step, written in OUT.partial, so that OUT never holds an unfinished one."""
    remove_file(disk, partial / WRITING)
    disk.put(partial / WRITING, data)
    disk.rename(partial / WRITING, out / name)


def _is_shard(entry: Written) -> bool:
    return entry.file.endswith(".safetensors")
