"""Read a model folder's safetensors strictly: every header is checked before any byte of a tensor is used."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from state.durable import Bytes
from state.errors import Difference, IdentityMismatch, InputError
from state.identity import tensor_digest
from state.mapped import MappedFile
from state.weights_file import INDEX, SINGLE, weights_file

# As in the reference reader of safetensors.
HEADER_LIMIT = 100_000_000
DEPTH_LIMIT = 64
FILE_LIMIT = 255
NAME_LIMIT = 200  # of characters; names become those of files and folders, which may have 255 bytes

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the source: `nbytes` bytes at `start` of `file`, which is relative to the folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Source:
    """The tensors of a model folder, by hub name. Open it with `Source.open`.

    files: those that hold them, by name. digested: what `digests` found.
    """

    folder: Path
    tensors: dict[str, TensorEntry]
    files: dict[str, MappedFile]
    digested: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | str) -> "Source":
        """Read and check all headers of `model.safetensors`, or of the shards that its index names.

        Raises:
            InputError: a file is missing, truncated, malformed or contradicts the index.
        """
        folder = Path(folder)
        index = None if weights_file(folder) == SINGLE else _read_index(folder / INDEX)
        files = [SINGLE] if index is None else sorted(set(index.values()))
        mapped = {file: MappedFile.open(folder / file) for file in files}
        tensors: dict[str, TensorEntry] = {}
        for file in files:
            for entry in _read_header(folder / file, file, mapped[file].data):
                if entry.name in tensors:
                    raise InputError(
                        f"{folder}: {entry.name} is in both {tensors[entry.name].file} and {file}"
                    )
                tensors[entry.name] = entry
        if index is not None:
            _check_index(folder / INDEX, index, tensors)
        return cls(folder, dict(sorted(tensors.items())), mapped)

    @property
    def stored(self) -> Mapping[str, TensorEntry]:
        """The tensors as the files hold them, which is what digests are of."""
        return self.tensors

    @property
    def quantized(self) -> Mapping[str, str]:
        """Tensors that the files hold in other form than they are presented in → that form."""
        return {}

    def made_from(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a tensor is made from."""
        return (name,)

    def read(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only. Raises InputError where there is no such tensor."""
        entry = self._entry(name)
        return self.files[entry.file].data[entry.start : entry.start + entry.nbytes]

    def private(self, name: str, index: int | None = None) -> memoryview:
        """The bytes of a tensor, or of one index into its first axis, writable: see `MappedFile.private`.

        Raises:
            InputError: there is no such tensor.
        """
        entry = self._entry(name)
        start, nbytes = entry.start, entry.nbytes
        if index is not None:
            nbytes //= entry.shape[0]
            start += index * nbytes
        return self.files[entry.file].private[start : start + nbytes]

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise InputError(f"{self.folder} has no tensor {name}")
        return self.tensors[name]

    def digest(self, name: str) -> str:
        """`BF16[4096,256] xxh3:...` of a stored tensor, as in `Identity.tensors`."""
        return self._digest(name, self.read(name))

    def _digest(self, name: str, data: Bytes) -> str:
        entry = self.tensors[name]
        return tensor_digest(entry.dtype, entry.shape, data)

    def digests(self, threads: int) -> dict[str, str]:
        """Digest of every stored tensor, by name; read in the order of the files.

        Raises:
            IdentityMismatch: a file changed meanwhile.
        """
        order = sorted(self.tensors.values(), key=lambda entry: (entry.file, entry.start))
        names = [entry.name for entry in order]
        with ThreadPoolExecutor(threads) as pool:
            found = dict(zip(names, pool.map(self.digest, names), strict=True))
        self.require_unchanged()
        self.digested.update(found)
        return {name: found[name] for name in self.tensors}

    def require_digested(self, name: str, data: Bytes) -> None:
        """Raise IdentityMismatch where the bytes of a tensor that are about to be used are not those that
        `digests` saw.
        """
        found = self._digest(name, data)
        if found != self.digested.get(name, found):
            file = self.files[self.tensors[name].file].path
            difference = Difference(f"tensors.{name}", self.digested[name], found)
            raise IdentityMismatch(
                f"{file} holds other bytes than when it was digested:\n  {difference}\n"
                "Give the same command again once nothing writes to it",
                [difference],
            )

    def require_unchanged(self) -> None:
        """Raise IdentityMismatch naming the first file that was written to, replaced or removed since it was
        opened. Contents are read only of a file that was touched (see `MappedFile.touched`), and compared
        with what `digests` saw.
        """
        for name, file in self.files.items():
            if (touched := file.touched()) is not None and self._is_as_digested(name):
                self.files[name] = file = touched
            file.require_unchanged()

    def _is_as_digested(self, file: str) -> bool:
        names = [name for name, entry in self.tensors.items() if entry.file == file]
        return all(self.digest(name) == self.digested.get(name) for name in names)


def read_json(path: Path, data: bytes, unique: bool = True) -> Any:
    """A JSON text of the model folder. unique: nothing may be named twice; else the last one counts.

    Raises:
        InputError: it is malformed, nested deeper than any that is meant, or names something twice.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            names = [name for name, _ in pairs]
            raise InputError(f"{path}: {next(n for n in names if names.count(n) > 1)!r} is named twice")
        return dict(pairs)

    try:
        content = json.loads(data.decode(), object_pairs_hook=refuse_duplicates if unique else None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({error})") from error
    if _is_deeper(content, DEPTH_LIMIT):
        raise InputError(f"{path}: malformed JSON (nested deeper than {DEPTH_LIMIT} levels)")
    return content


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = read_json(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or not file.isprintable()
            or not 0 < len(file) <= FILE_LIMIT
            or PurePosixPath(file).is_absolute()
            or ".." in Path(file).parts
        ):
            raise InputError(
                f"{path}: {name[:NAME_LIMIT]!r} is said to be in {str(file)[:60]!r}, which is no file in the "
                "model folder"
            )
        if not (path.parent / file).is_file():
            raise InputError(
                f"{path}: {name!r} is said to be in {file!r}, which is missing. Download it again."
            )
    return weight_map


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(f"{path}: {name!r} is said to be in {file!r}, which does not have it")
    for name, entry in tensors.items():
        if name not in index:
            raise InputError(f"{path} does not name {name}, which {entry.file} has")


def _read_header(path: Path, file: str, data: memoryview) -> list[TensorEntry]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > HEADER_LIMIT or 8 + length > len(data):
        raise InputError(
            f"{path} is truncated or no safetensors file ({len(data):,} bytes, header of {length:,})"
        )
    header = read_json(path, bytes(data[8 : 8 + length]))
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    entries = sorted(
        (_entry(path, file, name, fields, 8 + length) for name, fields in header.items()),
        key=lambda entry: (entry.start, entry.nbytes),
    )
    # The format allows neither holes nor overlaps, so that no byte belongs to nothing or to two tensors.
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise InputError(f"{path}: {entry.name} {fault} (starts at byte {entry.start}, expected {end})")
        end += entry.nbytes
    if end != len(data):
        fault = "truncated" if end > len(data) else "longer than its header says"
        raise InputError(f"{path} is {fault}: {len(data):,} bytes, expected {end:,}. Download it again.")
    return entries


def _entry(path: Path, file: str, name: str, fields: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: the header of {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{path}: {name} has the unknown dtype {dtype!r}")
    numbers = [start, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"{path}: {name} has shape {shape!r} and offsets {[start, end]!r}")
    if (end - start) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise InputError(f"{path}: {name} is {dtype}{shape}, which does not take {end - start:,} bytes")
    _require_name(path, name)
    return TensorEntry(name, dtype, tuple(shape), file, base + start, end - start)


def _require_name(path: Path, name: str) -> None:
    """Names of tensors become those of arrays and files, and are shown to people."""
    parts = name.split(".")
    if not (name.isprintable() and len(name) <= NAME_LIMIT and all(parts)) or set(name) & set("/\\"):
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        raise InputError(
            f"{path}: {shown!r} is no name for a tensor (names are printable parts with dots between, "
            f"without slashes, of at most {NAME_LIMIT} characters)"
        )
