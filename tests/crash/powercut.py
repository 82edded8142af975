"""What a power cut leaves: bytes that were synced, under names whose folder was synced. The harshest file
system that POSIX allows; ext4 and others forget less."""

import os
import random
import stat
import threading
from pathlib import Path

from tests.crash.interposer import Seen

Entries = dict[str, int]


class Durable:
    """Follows the operations below a folder and knows what of it would be there after a cut.

    Files and folders have numbers of our own: the system gives an inode number to a new file again.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._number_of: dict[int, int] = {}  # inode → number
        self._data: dict[int, bytes] = {}
        self._entries: dict[int, Entries] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._sync_tree(root)

    def done(self, seen: Seen) -> None:
        """Take in an operation that has been done."""
        path = Path(seen.path)
        if not path.is_relative_to(self._root):
            return
        with self._lock:
            self._take_in(seen, path)

    def _take_in(self, seen: Seen, path: Path) -> None:
        found = _stat(path)
        if found is None:
            return  # another thread was faster
        if seen.operation in ("create", "mkdir"):
            self._number(found, new=True)
        elif seen.operation == "sync":
            self._data[self._number(found)] = path.read_bytes()
        elif seen.operation == "sync folder":
            self._sync_folder(path)

    def leave(self, target: Path, seed: int | None) -> None:
        """Write into a new folder what a cut leaves: nothing that was not synced.

        Not into the folder itself: other threads work in there until the process is killed. With a seed, all
        names are kept, as a journal of names alone keeps them, and of bytes that were not synced none, half
        or all, by chance.
        """
        left: dict[str, bytes | None] = {}
        target.mkdir()
        with self._lock:
            self._find(left, seed)
        for name, data in left.items():
            path = target / name
            if data is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def _find(self, left: dict[str, bytes | None], seed: int | None) -> None:
        if seed is None:
            self._walk("", self._number(os.lstat(self._root)), left)
        else:
            chance = random.Random(seed)
            for name, found in sorted(_tree(self._root).items()):
                left[name] = None if stat.S_ISDIR(found.st_mode) else self._partly(name, found, chance)

    def _partly(self, name: str, found: os.stat_result, chance: random.Random) -> bytes:
        """What is left of a file whose name is."""
        durable = self._data.get(self._number(found), b"")
        try:
            data = (self._root / name).read_bytes()
        except OSError:
            return durable
        if durable == data:
            return data
        new = data.removeprefix(durable)
        base = durable if data.startswith(durable) else b""
        return base + new[: chance.choice((0, len(new) // 2, len(new)))]

    def _sync_tree(self, folder: Path) -> None:
        self._sync_folder(folder)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                self._sync_tree(Path(entry.path))
            else:
                self._data[self._number(entry.stat(follow_symlinks=False))] = Path(entry.path).read_bytes()

    def _sync_folder(self, folder: Path) -> None:
        found = _stat(folder)
        if found is not None:
            # A subfolder that was never synced is there, and empty.
            names = {path.name: _stat(path) for path in folder.iterdir()}
            there = {name: one for name, one in names.items() if one is not None}
            self._entries[self._number(found)] = {name: self._number(one) for name, one in there.items()}
            for one in there.values():
                if stat.S_ISDIR(one.st_mode):
                    self._entries.setdefault(self._number(one), {})

    def _walk(self, prefix: str, folder: int, durable: dict[str, bytes | None]) -> None:
        for name, number in self._entries.get(folder, {}).items():
            if number in self._entries:
                durable[prefix + name] = None
                self._walk(f"{prefix}{name}/", number, durable)
            else:
                durable[prefix + name] = self._data.get(number, b"")

    def _number(self, found: os.stat_result, new: bool = False) -> int:
        if new or found.st_ino not in self._number_of:
            self._number_of[found.st_ino] = self._next
            self._next += 1
        return self._number_of[found.st_ino]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _tree(root: Path) -> dict[str, os.stat_result]:
    """Everything below a folder, by its relative path; what vanishes meanwhile is left out."""
    paths = [Path(parent, name) for parent, folders, names in os.walk(root) for name in (*folders, *names)]
    found = {path.relative_to(root).as_posix(): _stat(path) for path in paths}
    return {name: one for name, one in found.items() if one is not None}
