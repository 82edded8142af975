"""Shards: the bytes of one safetensors file. Deterministic and free of torch.

The format: 8 bytes little-endian header length, a JSON header padded with spaces to 8 bytes, then the tensors
without gaps. Wide dtypes come first and names are sorted within a width, so that every tensor starts at a
multiple of its element size.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from state.durable import Bytes
from state.identity import Digesting, digest

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
}
"""Bytes per element by safetensors dtype name; those not listed (U8, I8, BOOL, F8_E4M3, F8_E5M2) take one."""

TENSORS = "tensors:"
"""How a digest begins that was made from those of a file's tensors."""

AT_ONCE = 1 << 22
"""Bytes that are read at a time to be digested."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a shard; dtype is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


def in_file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order in which a shard holds its tensors."""
    return sorted(specs, key=lambda spec: (-ITEM_BYTES.get(spec.dtype, 1), spec.name))


def header(specs: Sequence[TensorSpec]) -> bytes:
    """Length and JSON header for tensors in file order; holds no times and no paths."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        described[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Made(NamedTuple):
    """Bytes of an output tensor: all of them, or those that follow what came before."""

    name: str
    data: Bytes


class Assembly:
    """A shard whose tensors come in any order, each from beginning to end: where parts belong, and the digest
    of the whole.

    nbytes: of the file.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        ordered = in_file_order(specs)
        self._head = header(ordered)
        self._digests = {spec.name: Digesting() for spec in ordered}
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        position = len(self._head)
        for spec in ordered:
            self._next[spec.name] = position
            self._end[spec.name] = position = position + spec.nbytes
        self.nbytes = position

    def parts(self, made: Iterable[Made]) -> Iterator[tuple[int, Bytes]]:
        """Where in the file the header belongs, and then all that is made; the digest is taken before.

        Raises ValueError when a tensor has more or fewer bytes than the plan says.
        """
        yield 0, self._head
        for name, data in made:
            start = self._next[name]
            self._next[name] += memoryview(data).nbytes
            if self._next[name] > self._end[name]:
                raise ValueError(f"{name}: more bytes than were planned")
            self._digests[name].update(data)
            yield start, data
        for name, end in self._end.items():
            if self._next[name] != end:
                raise ValueError(f"{name}: {end - self._next[name]} bytes fewer than were planned")

    def digest(self) -> str:
        """The digest of what was given to `parts`: see `digest_of_shard`."""
        return _together([digest(self._head), *map(str, self._digests.values())])


def digest_of_shard(file: BinaryIO, size: int) -> str:
    """`tensors:<32 hex digits>`, from the digests of the header and of each tensor in the order of the file,
    so that it can be had before the file is whole.

    Raises ValueError where the header is none, or does not end where the file does.
    """
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise ValueError("a header that is longer than the file")
    file.seek(0)
    head = file.read(8 + length)
    described = json.loads(head[8:])
    ends = sorted(entry["data_offsets"][1] for name, entry in described.items() if name != "__metadata__")
    if [0, *ends][-1] != size - len(head):
        raise ValueError("a header of another file")
    sizes = [end - start for start, end in pairwise([0, *ends])]
    return _together([digest(head), *(_digest_of(file, nbytes) for nbytes in sizes)])


def _together(digests: Sequence[str]) -> str:
    return digest("\n".join(digests).encode()).replace("xxh3:", TENSORS)


def _digest_of(file: BinaryIO, nbytes: int) -> str:
    found = Digesting()
    while nbytes and (data := file.read(min(nbytes, AT_ONCE))):
        found.update(data)
        nbytes -= len(data)
    return str(found)


def index(shards: Sequence[tuple[str, Sequence[TensorSpec]]]) -> bytes:
    """`model.safetensors.index.json`: which shard holds which tensor."""
    weight_map = {spec.name: file for file, specs in shards for spec in specs}
    total = sum(spec.nbytes for _, specs in shards for spec in specs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
