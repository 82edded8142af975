"""Stands between Python and the file system: every operation on files below some folders passes a `Watcher`.

It wraps the functions of `os` and `open` themselves, and so sees what pathlib, shutil, filelock and every
other library written in Python do. Reads within C, such as those of mapped weights, it does not see. Linux
only: the path of a descriptor is what /proc says.
"""

import builtins
import io
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent.parent
ROOMS = tuple(f"{ROOT / room}{os.sep}" for room in ("holdfast", "pipeline", "stages", "state"))
PRIMITIVES = ("state/durable.py",)
"""Files whose functions every part of the program calls; who called them says more."""

READS = frozenset({"open", "read", "list", "stat"})
"""Operations that change nothing. All others do."""


@dataclass(frozen=True)
class Seen:
    """One operation: its name, the path it is about, and the function of the program that asked for it.

    `size` is the number of bytes of a write.
    """

    operation: str
    path: str
    phase: str
    size: int = 0


class Watcher(Protocol):
    """What is told of operations."""

    def before(self, seen: Seen, half: Callable[[], object] | None) -> None:
        """Called ahead of an operation; may end the process, or raise. `half` does half of a write."""

    def after(self, seen: Seen) -> None:
        """Called after an operation that did not fail."""


class Interposer:
    """Wraps the operations while `watching`. One at a time in a process.

    really_sync: whether fsync does its work; only a power cut could tell, and it takes long.
    """

    def __init__(self, roots: list[Path], watcher: Watcher, really_sync: bool = False) -> None:
        self._roots = [os.path.realpath(root) for root in roots]
        self._watcher = watcher
        self._thread = threading.local()
        self._really_sync = really_sync
        self._real: dict[str, Callable[..., Any]] = {}
        self._real_open = io.open

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context all operations below the roots are seen."""
        wrapped = self._wrapped()
        self._real = {name: getattr(os, name) for name in wrapped}
        for name, function in wrapped.items():
            for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
                if self._real[name] in able:
                    able.add(function)
            setattr(os, name, function)
        io.open = builtins.open = self._open_file  # type: ignore[assignment]
        try:
            yield
        finally:
            io.open = builtins.open = self._real_open
            for name, real in self._real.items():
                setattr(os, name, real)

    def pass_through(
        self, operation: str, path: str | None, do: Callable[[], Any], half: Any = None, size: int = 0
    ) -> Any:
        """Do an operation, seen by the watcher where its path is below a root."""
        if path is None or not self._inside(path) or getattr(self._thread, "in_watcher", False):
            return do()
        seen = Seen(operation, path, _phase(sys._getframe(1)), size)
        with self._unwatched():
            self._watcher.before(seen, half)
        result = do()
        with self._unwatched():
            self._watcher.after(seen)
        return result

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """What the watcher does itself is not watched."""
        self._thread.in_watcher = True
        try:
            yield
        finally:
            self._thread.in_watcher = False

    def path_of(self, place: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path of a name or a descriptor; None where it has none."""
        try:
            if isinstance(place, int):
                return _descriptor(place)
            name = os.fsdecode(place)
            base = _descriptor(dir_fd) if dir_fd is not None else str(Path.cwd())
            path = os.path.normpath(os.path.join(base, name))  # noqa: PTH118
            if path.startswith("/proc/"):
                path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # noqa: PTH118, PTH119, PTH120
            return path
        except OSError:
            return None

    def _inside(self, path: str) -> bool:
        return any(path == root or path.startswith(root + os.sep) for root in self._roots)

    def _opening(self, path: str | None, writing: bool, create: bool, truncate: bool) -> str:
        """What an `open` does: open, create, empty or open to change."""
        if not writing:
            return "open"
        if create and path is not None and not os.path.lexists(path):
            return "create"
        return "empty" if truncate else "change"

    def _wrapped(self) -> dict[str, Callable[..., Any]]:
        """A wrapper for every function of `os` that works on files, by its name."""
        real = {name: getattr(os, name) for name in dir(os)}

        def simple(operation: str, name: str) -> Callable[..., Any]:
            def wrapper(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
                where = self.path_of(path, kwargs.get("dir_fd"))
                return self.pass_through(operation, where, lambda: real[name](path, *args, **kwargs))

            return wrapper

        def moving(operation: str, name: str) -> Callable[..., Any]:
            def wrapper(source: Any, target: Any, **kwargs: Any) -> Any:
                where = self.path_of(target, kwargs.get("dst_dir_fd"))
                return self.pass_through(operation, where, lambda: real[name](source, target, **kwargs))

            return wrapper

        def syncing(name: str) -> Callable[[int], None]:
            def wrapper(descriptor: int) -> None:
                folder = stat.S_ISDIR(real["fstat"](descriptor).st_mode)
                operation = "sync folder" if folder else "sync"
                do = (lambda: real[name](descriptor)) if self._really_sync else lambda: None
                self.pass_through(operation, self.path_of(descriptor), do)

            return wrapper

        def writing(name: str, position: int) -> Callable[..., Any]:
            def wrapper(descriptor: int, data: Any, *rest: Any) -> Any:
                view = memoryview(data).cast("B") if name in ("write", "pwrite") else None
                size = len(view) if view is not None else 0
                half = None
                if view is not None and size > 1:
                    half = lambda: real[name](descriptor, view[: size // 2], *rest)  # noqa: E731
                do = lambda: real[name](descriptor, data, *rest)  # noqa: E731
                return self.pass_through("write", self.path_of(descriptor), do, half, size)

            return wrapper

        def opening(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            where = self.path_of(path, dir_fd)
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR))
            operation = self._opening(where, changes, bool(flags & os.O_CREAT), bool(flags & os.O_TRUNC))
            return self.pass_through(operation, where, lambda: real["open"](path, flags, mode, dir_fd=dir_fd))

        names = {
            "unlink": "unlink",
            "remove": "unlink",
            "rmdir": "rmdir",
            "mkdir": "mkdir",
            "listdir": "list",
        }
        names |= {"scandir": "list", "stat": "stat", "truncate": "write", "ftruncate": "write"}
        names |= {"read": "read", "pread": "read", "preadv": "read", "readv": "read"}
        wrapped: dict[str, Callable[..., Any]] = {name: simple(op, name) for name, op in names.items()}
        wrapped |= {name: moving(op, name) for name, op in {"rename": "rename", "replace": "rename"}.items()}
        wrapped |= {name: syncing(name) for name in ("fsync", "fdatasync")}
        wrapped |= {name: writing(name, 1) for name in ("write", "pwrite", "writev", "pwritev")}
        wrapped["open"] = opening
        return wrapped

    def _open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        where = self.path_of(file)
        if where is None or not self._inside(where) or opener is not None:
            return self._real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw_mode = mode.replace("b", "").replace("t", "")
        changes = bool(set(raw_mode) & set("wax+"))
        operation = self._opening(where, changes, bool(set(raw_mode) & set("wax")), "w" in raw_mode)
        if isinstance(file, int):
            raw = WatchedFile(self, file, raw_mode, closefd)
        else:
            raw = self.pass_through(operation, where, lambda: WatchedFile(self, file, raw_mode, closefd))
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any
        if "+" in raw_mode:
            buffered = io.BufferedRandom(raw, size)
        else:
            buffered = io.BufferedWriter(raw, size) if changes else io.BufferedReader(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode  # type: ignore[misc]
        return text


class WatchedFile(io.FileIO):
    """The raw file below whatever `open` gives."""

    def __init__(self, interposer: Interposer, file: Any, mode: str, closefd: bool) -> None:
        super().__init__(file, mode, closefd)
        self._interposer = interposer
        self._where = interposer.path_of(self.fileno())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = (lambda: super(WatchedFile, self).write(view[: len(view) // 2])) if len(view) > 1 else None
        do = lambda: super(WatchedFile, self).write(view)  # noqa: E731
        return self._interposer.pass_through("write", self._where, do, half, len(view))

    def truncate(self, size: int | None = None) -> int:
        return self._interposer.pass_through(
            "write", self._where, lambda: super(WatchedFile, self).truncate(size)
        )

    def readinto(self, buffer: Any) -> int | None:
        return self._interposer.pass_through(
            "read", self._where, lambda: super(WatchedFile, self).readinto(buffer)
        )

    def readall(self) -> bytes | None:
        return self._interposer.pass_through("read", self._where, lambda: super(WatchedFile, self).readall())

    def read(self, size: int | None = -1) -> bytes | None:
        if size is None or size < 0:
            return self.readall()
        return self._interposer.pass_through("read", self._where, lambda: super(WatchedFile, self).read(size))


def _descriptor(number: int) -> str:
    """The path that a descriptor was opened by, or has been renamed to."""
    return os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115


def _phase(frame: Any) -> str:
    """The innermost function of the program, primitives aside, that led to an operation."""
    nearest = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOMS):
            name = file.removeprefix(f"{ROOT}{os.sep}")
            nearest = nearest or f"{name.removesuffix('.py')}:{frame.f_code.co_name}"
            if name not in PRIMITIVES:
                return f"{name.removesuffix('.py')}:{frame.f_code.co_name}"
        frame = frame.f_back
    return nearest or "library"
