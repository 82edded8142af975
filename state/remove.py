"""Removing files of a run: those that a record of ours names, by that name, and folders only once empty."""

from collections.abc import Collection, Iterable
from pathlib import Path

from state.durable import Disk
from state.head import BrokenHead, Head
from state.paths import HEADS, RECORD_COPY, refuse_links
from state.writing import all_writing

DROPPED = ".dropped"


def remove_files(run: Path, paths: Collection[str], disk: Disk) -> None:
    """Remove files inside a run, then their folders as far as they are empty; durable on return.

    Raises:
        InputError: a folder on the way is a symbolic link.
    """
    refuse_links(run, paths)
    for path in sorted(paths):
        disk.remove(run / path)
    remove_empty_parents(run, paths, disk)


def remove_empty_parents(run: Path, paths: Iterable[str], disk: Disk) -> None:
    """Remove the folders that files were in, as far as they are empty; what is left is synced."""
    folders = {parent for path in paths for parent in Path(path).parents} - {Path()}
    left: set[Path] = set()
    for folder in sorted(folders, key=lambda folder: (-len(folder.parts), folder)):
        if not (run / folder).is_dir() or disk.remove_empty(run / folder):
            left.discard(folder)
            left.add(folder.parent)
        else:
            left.add(folder)
    disk.sync(run / folder for folder in sorted(left) if (run / folder).is_dir())


def drop(run: Path, heads: Iterable[Head], keep: Iterable[Head], disk: Disk) -> None:
    """Remove heads, and the objects that only they name.

    A head goes first, under another name that still says which objects are to go: a head without its objects
    would be damage, and objects without a head nobody's.
    """
    for head in heads:
        dropped = f"{HEADS}/{head.number:06d}{DROPPED}"
        if (run / dropped).exists():
            continue  # not ours, or it would be gone by now; an old head more is no harm
        disk.move(run / head.path, run / dropped)
        _finish_dropping(run, head, keep, disk)
        disk.remove(run / dropped)


def finish_cut_short(run: Path, keep: Collection[Head], published: int, disk: Disk) -> None:
    """Remove what commits that were cut short, or removals that were, have left.

    published: the highest number of a commit that was not cut short; -1 if none was made.
    """
    names = disk.list(run / HEADS)
    for name in names:
        if name.endswith(DROPPED):
            try:
                head = Head.decode(disk.read(run / HEADS / name), run)
            except (BrokenHead, OSError):
                continue
            if f"{head.number:06d}{DROPPED}" == name:
                _finish_dropping(run, head, keep, disk)
                disk.remove(run / HEADS / name)
    kept = named_by(keep) | ({RECORD_COPY} if keep else set())
    for record in all_writing(run, names, disk):
        left = [path for path in record.files if path not in kept and (run / path).is_file()]
        if left and record.number > published:
            remove_files(run, left, disk)
        record.end(run, disk)


def named_by(heads: Iterable[Head]) -> set[str]:
    """Every file that some of the heads name, their own included."""
    return {path for head in heads for path in (head.path, *head.objects)}


def _finish_dropping(run: Path, head: Head, keep: Iterable[Head], disk: Disk) -> None:
    if gone := head.objects.keys() - named_by(keep):
        remove_files(run, gone, disk)
