"""The few operations on files that everything durable is built from.

One small interface, so that object stores can follow and tests can fail any single operation.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from state.errors import InputError, OutOfSpace, RunBusy, Unreadable, WriteFailed
from state.lock_file import holder, refuse_other_file

DEVICE_ERRORS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "disk quota reached",
}
"""Errors that room on the device would mend."""

ACCESS_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
ACCESS_ERRORS |= {errno.ELOOP, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV}
WRITE_ERRORS = {
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENXIO,
    errno.ENODEV,
    errno.ETIMEDOUT,
}

PAUSES = (0.05, 0.2, 0.5)
"""Seconds between attempts to read what a device could not give: it often can a moment later."""

Bytes = bytes | bytearray | memoryview
Got = TypeVar("Got")


class Disk:
    """Durable primitives on a local file system.

    Each changing primitive calls `before(operation, path)` ahead of every step that can fail or be cut short.

    Raises:
        OutOfSpace: the device is full.
        WriteFailed: the device reports an error while writing.
        Unreadable: the device can't give a file or folder now.
        InputError: a file or folder may not be read or written.
    """

    def before(self, operation: str, path: Path) -> None:
        """Called ahead of each step; does nothing. Tests override it to fail or kill at a chosen step."""

    def put(self, path: Path, data: Bytes) -> None:
        """Write a new file and fsync it, making its parents. Its name is durable after `sync` of the folders.

        Raises:
            FileExistsError: `path` exists; published bytes are never overwritten.
        """
        with self._writing(path, memoryview(data).nbytes):
            self.before("put", path)
            _make_folder(path.parent)
            self._write(path, data, os.O_EXCL)

    def put_parts(self, path: Path, nbytes: int, parts: Iterable[tuple[int, Bytes]]) -> None:
        """As `put`, of a file of `nbytes` that comes in parts, each with the place where it begins. Where a
        part can't be had, or written, the beginning of a file stays.
        """
        with self._writing(path, nbytes):
            self.before("put", path)
            _make_folder(path.parent)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_EXCL, 0o666)
        try:
            for start, data in parts:
                with self._writing(path, nbytes):
                    self.before("write", path)
                    _write_at(descriptor, start, data)
            with self._writing(path, nbytes):
                self.before("fsync", path)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, path: Path, data: Bytes) -> None:
        """Replace a file in one step: readers and crashes see old bytes or new ones. Durable on return."""
        temporary = path.with_name(path.name + ".tmp")
        with self._writing(path, memoryview(data).nbytes):
            self.before("publish", temporary)
            _make_folder(path.parent)
            self._write(temporary, data, os.O_TRUNC)
            self.before("replace", path)
            temporary.replace(path)
        self.sync([path.parent])

    def append(self, path: Path, data: Bytes) -> None:
        """Add to the end of a log in one write, without fsync: a power cut may take its last lines."""
        with self._writing(path, memoryview(data).nbytes):
            self.before("append", path)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)

    def sync(self, directories: Iterable[Path]) -> None:
        """Make the entries of each directory durable, in the given order."""
        for directory in directories:
            with self._writing(directory, 0):
                self.before("sync", directory)
                descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or folder within a file system; durable on return."""
        with self._writing(target, 0):
            self.before("rename", target)
            source.rename(target)
        self.sync(dict.fromkeys((target.parent, source.parent)))

    def move(self, source: Path, target: Path) -> None:
        """Give a file another name, making the folders it needs. Durable after `sync` of both parents.

        Raises:
            FileExistsError: `target` exists; nothing is ever moved over something else.
        """
        with self._writing(target, 0):
            self.before("move", target)
            _make_folder(target.parent)
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            source.rename(target)

    def remove(self, path: Path) -> None:
        """Remove one file or link if it is there, never a folder. Not synced."""
        with self._writing(path, 0):
            self.before("remove", path)
            path.unlink(missing_ok=True)

    def remove_empty(self, path: Path) -> bool:
        """Remove a folder if it is empty; whether it is gone."""
        with self._writing(path, 0):
            self.before("remove", path)
            try:
                path.rmdir()
            except FileNotFoundError:
                return True
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    return False
                raise
            return True

    def make_folder(self, path: Path) -> None:
        """Make one folder, if it is not there. Its name is durable after `sync` of its parent."""
        with self._writing(path, 0):
            self.before("mkdir", path)
            _make_folder(path)

    def list(self, path: Path) -> list[str]:
        """Names in a folder, sorted; none if it does not exist.

        Raises:
            Unreadable: the device can't give them now, after several attempts.
            InputError: it may not be read.
        """
        try:
            return patiently(path, lambda: sorted(self.names(path)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, path: Path) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError, IsADirectoryError, NotADirectoryError: there is no such file.
            Unreadable: the device can't give it now, after several attempts.
            InputError: it may not be read.
        """
        return patiently(path, lambda: self.bytes(path))

    def names(self, path: Path) -> Iterable[str]:
        """One attempt of `list`. Tests override it to fail."""
        return (entry.name for entry in path.iterdir())

    def bytes(self, path: Path) -> bytes:
        """One attempt of `read`. Tests override it to fail."""
        return path.read_bytes()

    def free_bytes(self, path: Path) -> int:
        """Bytes free where `path` is, or would be."""
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold the lock file `path`, or fail at once. The operating system frees it however the process ends.

        Raises:
            RunBusy: another holder exists.
            InputError: `path` is a file of somebody else, which the holder's number would overwrite.
        """
        with self._writing(path, 0):
            _make_folder(path.parent)
            refuse_other_file(path)
            # A soft lock (a marker file) would outlive a killed holder: a file system without flock is
            # refused.
            lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
            try:
                lock.acquire()
            except Timeout:
                raise RunBusy(
                    f"{path.parent} is being written by {holder(path)}. "
                    f"Wait until it ends, or stop it, then give the same command again; "
                    f"`holdfast status {path.parent}` can be used meanwhile."
                ) from None
        try:
            # The number is only for the message above; a full disk must not cost the lock.
            with suppress(OSError):
                path.write_text(f"{os.getpid()}\n")
            yield
        finally:
            lock.release()

    def _write(self, path: Path, data: Bytes, flag: int) -> None:
        # Never through a link: it may lead to a file of somebody else.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flag, 0o666)
        try:
            _write_at(descriptor, 0, data)
            self.before("fsync", path)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self, path: Path, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = path if path.name else path.resolve()  # "." would name nothing to a person
            if error.errno in DEVICE_ERRORS:
                raise OutOfSpace(path, needed, self.free_bytes(path), DEVICE_ERRORS[error.errno]) from error
            if error.errno == errno.ENOSYS:
                raise InputError(
                    f"{path}: this file system has no locks (flock). Choose another place."
                ) from error
            if error.errno in WRITE_ERRORS:
                raise WriteFailed(path, os.strerror(error.errno or 0)) from error
            if error.errno == errno.ELOOP:
                raise InputError(
                    f"{path} is or lies behind a symbolic link, through which nothing is written. Remove it."
                ) from error
            if error.errno in ACCESS_ERRORS:
                raise InputError(
                    f"{path} may not be written: {error.strerror}. Choose another place."
                ) from error
            raise


def patiently(path: Path, attempt: Callable[[], Got]) -> Got:
    """What an attempt at reading gives, made again after each of PAUSES where the device can't give it.

    Raises Unreadable and InputError as `Disk.read` does, and at once what says that no such file is there.
    """
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except PermissionError as error:
            raise InputError(f"{path} may not be read: {error.strerror}") from error
        except OSError as error:
            if pause is None:
                raise Unreadable(path, error.errno or 0, os.strerror(error.errno or 0)) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _write_at(descriptor: int, start: int, data: Bytes) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(descriptor, view, start)
        view, start = view[done:], start + done


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
