"""What in a folder is ours: regular files that a record names, with the size it says, reached by no link.

Everything else is somebody else's: it is never deleted, replaced or written through, and it is named.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import xxhash

from stages.export.records import Written
from stages.export.shards import TENSORS, digest_of_shard
from state.durable import Disk
from state.errors import InputError


def parents(name: str) -> list[str]:
    """The folders that a plain name goes through, from the top: `a/b/c` → `a`, `a/b`."""
    return [parent.as_posix() for parent in reversed(PurePosixPath(name).parents)][1:]


def is_folder(path: Path) -> bool:
    """Whether a folder is there, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def is_ours(folder: Path, entry: Written) -> bool:
    """Whether the file that an entry names is there, with its size, as a regular file reached by no link."""
    if not all(is_folder(folder / parent) for parent in parents(entry.file)):
        return False
    try:
        found = (folder / entry.file).lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == entry.bytes


def is_intact(folder: Path, entry: Written) -> bool:
    """Whether the file is ours and holds the bytes that were written.

    Raises:
        InputError: it can't be read now.
    """
    if not is_ours(folder, entry):
        return False
    path = folder / entry.file
    try:
        with path.open("rb") as file:
            if entry.digest.startswith(TENSORS):
                return digest_of_shard(file, entry.bytes) == entry.digest
            return f"xxh3:{hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}" == entry.digest
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no header that we wrote
        return False
    except OSError as error:
        raise InputError(
            f"{path} can't be read now: {error.strerror}. Give the same command again."
        ) from error


def foreign(disk: Disk, folder: Path, entries: Sequence[Written], records: Iterable[str]) -> list[str]:
    """What is in a folder besides its records and the files that are ours; a folder ends in `/`."""
    known = {entry.file for entry in entries}
    passed = {parent for name in known for parent in parents(name)}
    ours = {entry.file for entry in entries if is_ours(folder, entry)} | set(records)
    found, waiting = [], [""]
    while waiting:
        inside = waiting.pop()
        for child in disk.list(folder / inside):
            name = f"{inside}/{child}" if inside else child
            if name in passed and is_folder(folder / name):
                waiting.append(name)
            elif name not in ours:
                found.append(f"{name}/" if is_folder(folder / name) else name)
    return sorted(found)


def obstacles(folder: Path, names: Iterable[str], ours: Iterable[str]) -> list[str]:
    """What stands where files are to be written: foreign files, and links or files in place of folders."""
    may_go = set(ours)
    found = set()
    for name in names:
        for parent in parents(name):
            if os.path.lexists(folder / parent) and not is_folder(folder / parent):
                found.add(parent)
                break
        else:
            if os.path.lexists(folder / name):
                found.add(name)
    return sorted(found - may_go)


def make_parents(disk: Disk, folder: Path, name: str) -> None:
    """Make the folders that a name goes through, durably."""
    for parent in parents(name):
        if not is_folder(folder / parent):
            disk.make_folder(folder / parent)
            disk.sync([(folder / parent).parent])


def remove_file(disk: Disk, path: Path) -> None:
    """Delete a file whose name is proof enough, inside a folder that is ours; no folder, whatever its name.

    Raises:
        InputError: it is no file.
    """
    if is_folder(path):
        raise InputError(f"{path} is a folder where Holdfast keeps a file; move it away")
    if os.path.lexists(path):
        disk.remove(path)


def remove_owned(disk: Disk, folder: Path, entries: Sequence[Written]) -> None:
    """Delete the files of these entries that are ours, and the folders left empty; durable on return."""
    for entry in entries:
        if is_ours(folder, entry):
            disk.remove(folder / entry.file)
    inside = {parent for entry in entries for parent in parents(entry.file)}
    for parent in sorted(inside, key=lambda name: (-name.count("/"), name)):
        if all(is_folder(folder / part) for part in (*parents(parent), parent)):
            disk.sync([folder / parent])
            disk.remove_empty(folder / parent)
    disk.sync([folder])
