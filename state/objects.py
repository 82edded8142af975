"""Objects: the files of a commit, known by their path relative to the run and the digest of their bytes.

Writing encodes with zarr in memory and puts the bytes on the disk in this thread, so that the order of
operations is fixed and a failure leaves nothing running. Reading gives bytes only if they are those that were
committed.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from state.durable import Bytes, Disk
from state.identity import digest
from state.paths import RECORD, RECORD_COPY, ZARR

SOLUTIONS = f"{ZARR}/solutions/"
SOLUTION = re.compile(rf"{re.escape(SOLUTIONS)}([^/]+)/(\d+)/zarr\.json")

READINGS = 2
"""Times a file is read before other bytes than expected are believed to be what it holds."""


class BrokenObject(Exception):
    """An object is missing, or its bytes are not those that were committed."""

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"{describe(path)} {fault}")
        self.path = path


def solutions(paths: Iterable[str]) -> dict[str, set[int]]:
    """Of the paths of a commit's objects: solver → the layers that it has solved."""
    found: dict[str, set[int]] = defaultdict(set)
    for match in filter(None, map(SOLUTION.fullmatch, paths)):
        found[match[1]].add(int(match[2]))
    return dict(found)


def solution_files(paths: Iterable[str], wanted: Iterable[tuple[str, int]]) -> list[str]:
    """Of the paths of a commit's objects, those of the solutions (solver, layer) that are wanted."""
    folders = tuple(f"{SOLUTIONS}{solver}/{layer}/" for solver, layer in wanted)
    return [path for path in paths if path.startswith(folders)]


def describe(path: str) -> str:
    """The array that an object belongs to, in words: `array tokens, c.0.0`."""
    if not path.startswith(f"{ZARR}/"):
        return path
    name, _, key = path.removeprefix(f"{ZARR}/").rpartition("/")
    return f"array {name}, {key}" if name else path


def read_object(run: Path, path: str, expected: str, disk: Disk) -> bytes:
    """The bytes of an object; those of `run.json` from its copy where that alone is whole.

    Raises:
        BrokenObject: missing, or other bytes than committed, also when read again.
        Unreadable: the device can't give it now.
    """
    try:
        return read_file(run, path, expected, disk)
    except BrokenObject:
        if path != RECORD:
            raise
        try:
            return read_file(run, RECORD_COPY, expected, disk)
        except BrokenObject:
            pass
        raise


def read_file(run: Path, path: str, expected: str, disk: Disk) -> bytes:
    """The bytes of a file with a known digest; raises as `read_object` does."""
    for _ in range(READINGS):
        try:
            data = disk.read(run / path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BrokenObject(path, "is missing") from None
        except OSError as error:
            raise BrokenObject(path, f"cannot be read ({error.strerror})") from error
        if digest(data) == expected:
            return data
    raise BrokenObject(path, "is damaged (its digest differs)")


def empty_group() -> bytes:
    """The metadata of a zarr group without attributes, as it is stored."""
    encoded: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(encoded), path="", attributes={})
    return encoded["zarr.json"].to_bytes()


def array_files(name: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[str]:
    """The files that `ObjectWriter.array` writes: an array is cut along axis 0 alone."""
    yield f"{ZARR}/{name}/zarr.json"
    if not shape:
        yield f"{ZARR}/{name}/c"
        return
    for number in range(-(-shape[0] // max(chunks[0], 1))):
        yield f"{ZARR}/{name}/" + ".".join(["c", str(number), *["0"] * (len(shape) - 1)])


class ObjectWriter:
    """Writes new objects of one commit and keeps their digests.

    Attributes:
        objects: path -> digest of everything written so far.
    """

    def __init__(self, run: Path, disk: Disk) -> None:
        self.run = run
        self.disk = disk
        self.objects: dict[str, str] = {}
        self._encoded: dict[str, Buffer] = {}

    def put(self, path: str, data: Bytes) -> None:
        """Write one object."""
        self.disk.put(self.run / path, data)
        self.objects[path] = digest(data)

    def group(self, name: str, attributes: Mapping[str, Any] | None = None) -> None:
        """Write a zarr group's metadata; `name` is relative to `calibration.zarr`, "" is its root."""
        zarr.create_group(MemoryStore(self._encoded), path=name, attributes=dict(attributes or {}))
        self._drain(name)

    def array(
        self,
        name: str,
        values: NDArray[np.generic],
        *,
        fill: float | int,
        axes: tuple[str, ...],
        chunks: tuple[int, ...],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a zarr array, uncompressed with crc32c, one chunk along axis 0 at a time."""
        array = zarr.create_array(
            MemoryStore(self._encoded),
            name=name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(max(size, 1) for size in chunks),
            # One folder per array, not one per chunk: every new folder costs an fsync.
            chunk_key_encoding={"name": "default", "separator": "."},
            fill_value=fill,
            compressors=[Crc32cCodec()],
            dimension_names=axes,
            attributes=dict(attributes or {}),
            # A chunk that is not written reads as the fill value, as a lost one would.
            config={"write_empty_chunks": True},
        )
        self._drain(name)
        if not values.shape:
            array[...] = values
            self._drain(name)
        for start in range(0, values.shape[0] if values.shape else 0, chunks[0] if chunks else 1):
            array[start : start + chunks[0]] = values[start : start + chunks[0]]
            self._drain(name)

    def sync(self) -> None:
        """Make the directories of everything written durable, deepest first, up to and including the
        run's.
        """
        directories = {self.run}
        for path in self.objects:
            directories.update(
                parent for parent in (self.run / path).parents if parent.is_relative_to(self.run)
            )
        self.disk.sync(sorted(directories, key=lambda directory: (-len(directory.parts), directory)))

    def _drain(self, name: str) -> None:
        # Metadata stays in memory: zarr wants to see an array's own and its parents' while writing chunks.
        prefix = f"{name}/" if name else ""
        for key in sorted(self._encoded):
            path = f"{ZARR}/{key}"
            if key.startswith(prefix) and path not in self.objects:
                self.put(path, self._encoded[key].to_bytes())
                if not key.endswith("zarr.json"):
                    del self._encoded[key]


class EncodedObjects(ObjectWriter):
    """Encodes as `ObjectWriter` does, and keeps the bytes in memory.

    Attributes:
        data: path -> bytes.
    """

    def __init__(self, run: Path, disk: Disk) -> None:
        super().__init__(run, disk)
        self.data: dict[str, bytes] = {}

    def put(self, path: str, data: Bytes) -> None:
        """Keep one object."""
        self.data[path] = bytes(data)
        self.objects[path] = digest(data)


class VerifiedStore(WrapperStore[LocalStore]):
    """A read-only zarr store that shows exactly the objects of one commit.

    A stray file is not seen; a missing or altered one raises BrokenObject instead of reading as the fill
    value.
    """

    def __init__(self, run: Path, objects: Mapping[str, str], disk: Disk) -> None:
        super().__init__(LocalStore(run / ZARR, read_only=True))
        self._run = run
        self._objects = objects
        self._disk = disk

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a key, or None where the commit has no such object."""
        if byte_range is not None:
            raise NotImplementedError("a part of an object has no digest")
        path = f"{ZARR}/{key}"
        if path not in self._objects:
            return None
        return prototype.buffer.from_bytes(read_object(self._run, path, self._objects[path], self._disk))

    async def exists(self, key: str) -> bool:
        """Whether the commit has an object of this key."""
        return f"{ZARR}/{key}" in self._objects
