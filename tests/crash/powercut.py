"""What a power cut leaves: bytes that were synced, under names whose folder was synced. The harshest file
system that POSIX allows; ext4 and others forget less."""

import os
import random
import shutil
import stat
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
        self._sync_tree(root)

    def done(self, seen: Seen) -> None:
        """Take in an operation that has been done."""
        path = Path(seen.path)
        if not path.is_relative_to(self._root):
            return
        if seen.operation in ("create", "mkdir"):
            self._number(os.lstat(path), new=True)
        elif seen.operation == "sync":
            found = _stat(path)
            if found is not None:
                self._data[self._number(found)] = path.read_bytes()
        elif seen.operation == "sync folder":
            self._sync_folder(path)

    def cut(self, seed: int | None) -> None:
        """Turn the folder into what a cut leaves: nothing that was not synced.

        With a seed, all names are kept, as a journal of names alone keeps them, and of bytes that were not
        synced none, half or all, by chance.
        """
        left: dict[str, bytes | None] = {}
        if seed is None:
            self._walk("", self._number(os.lstat(self._root)), left)
        else:
            chance = random.Random(seed)
            for name, data in sorted(_files(self._root).items()):
                left[name] = None if data is None else self._partly(self._root / name, data, chance)
        for path in list(self._root.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name, data in left.items():
            path = self._root / name
            if data is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def _partly(self, path: Path, data: bytes, chance: random.Random) -> bytes:
        """What is left of a file whose name is."""
        durable = self._data.get(self._number(os.lstat(path)), b"")
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
            names = {path.name: path.lstat() for path in folder.iterdir()}
            self._entries[self._number(found)] = {name: self._number(one) for name, one in names.items()}
            for one in names.values():
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


def _files(root: Path) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for parent, folders, names in os.walk(root):
        below = Path(parent).relative_to(root)
        found |= {(below / name).as_posix(): None for name in folders}
        found |= {(below / name).as_posix(): Path(parent, name).read_bytes() for name in names}
    return found
