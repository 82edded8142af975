"""Disks that fail: at the k-th step by a crash, a torn write or an error, or by a power cut that forgets."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

from state.durable import Bytes, Disk


class Crash(BaseException):
    """Stands for SIGKILL within a process: no handler of the code under test may catch it."""


class CountingDisk(Disk):
    """Counts and names the steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Path]] = []

    def before(self, operation: str, path: Path) -> None:
        self.steps.append((operation, path))


class CrashingDisk(CountingDisk):
    """Ends the process, as it were, at step `at`; nothing is done after it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, operation: str, path: Path) -> None:
        super().before(operation, path)
        if len(self.steps) > self.at:
            raise Crash


class TearingDisk(CrashingDisk):
    """As CrashingDisk, but the last write before the end has left only half of its bytes."""

    def before(self, operation: str, path: Path) -> None:
        if operation == "fsync" and len(self.steps) == self.at:
            os.truncate(path, path.stat().st_size // 2)
        super().before(operation, path)


class FailingDisk(CountingDisk):
    """Reports an error of the device from step `at` on."""

    def __init__(self, at: int, error: int) -> None:
        super().__init__()
        self.at = at
        self.error = error

    def before(self, operation: str, path: Path) -> None:
        super().before(operation, path)
        if len(self.steps) > self.at:
            raise OSError(self.error, os.strerror(self.error))


class UnreadableDisk(Disk):
    """Reports an error of the device instead of what is read: the first `times` times, for files whose path
    ends in `name`.
    """

    def __init__(self, error: int, times: int, name: str = "") -> None:
        self.error = error
        self.times = times
        self.name = name

    def names(self, path: Path) -> Iterable[str]:
        self._fail(path)
        return super().names(path)

    def bytes(self, path: Path) -> bytes:
        self._fail(path)
        return super().bytes(path)

    def _fail(self, path: Path) -> None:
        if self.times and str(path).endswith(self.name):
            self.times -= 1
            raise OSError(self.error, os.strerror(self.error))


class ForgetfulDisk(CrashingDisk):
    """Knows what a power cut leaves: bytes that were fsynced, under names whose folder was fsynced."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(at)
        self.root = root
        self.synced: dict[int, bytes] = {}
        self.entries: dict[Path, dict[str, bytes | None]] = {}

    def _write(self, path: Path, data: Bytes, flag: int) -> None:
        super()._write(path, data, flag)
        self.synced[path.stat().st_ino] = bytes(data)

    def sync(self, directories: Iterable[Path]) -> None:
        for directory in directories:
            super().sync([directory])
            self.entries[directory] = {
                entry.name: None if entry.is_dir() else self.synced.get(entry.stat().st_ino, b"")
                for entry in directory.iterdir()
            }

    def after_power_cut(self, target: Path, seed: int | None) -> None:
        """Write to `target` what is left of `root`.

        Args:
            seed: None: nothing that was not synced survives. Otherwise each such change survives by chance.
        """
        durable: dict[Path, bytes] = {}
        self._walk(self.root, durable)
        chance = random.Random(seed)
        seen = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        for path in sorted(durable.keys() | seen.keys()):
            survives = seed is not None and chance.random() < 0.5
            data = seen.get(path) if survives else durable.get(path)
            if data is not None:
                kept = target / path.relative_to(self.root)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)

    def _walk(self, directory: Path, durable: dict[Path, bytes]) -> None:
        for name, data in self.entries.get(directory, {}).items():
            if data is None:
                self._walk(directory / name, durable)
            else:
                durable[directory / name] = data
