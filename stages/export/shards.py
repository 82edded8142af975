"""Shards: the bytes of one safetensors file. Deterministic and free of torch.

The format: 8 bytes little-endian header length, a JSON header padded with spaces to 8 bytes, then the tensors
without gaps. Wide dtypes come first and names are sorted within a width, so that every tensor starts at a
multiple of its element size.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from state.durable import Bytes

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


def encode(specs: Sequence[TensorSpec], read: Callable[[TensorSpec], Bytes]) -> bytearray:
    """The whole file. `read` is called once per tensor, in file order.

    Raises ValueError when `read` returns another number of bytes than the plan says.
    """
    ordered = in_file_order(specs)
    head = header(ordered)
    shard = bytearray(len(head) + sum(spec.nbytes for spec in ordered))
    shard[: len(head)] = head
    position = len(head)
    for spec in ordered:
        data = memoryview(read(spec)).cast("B")
        if len(data) != spec.nbytes:
            raise ValueError(f"{spec.name}: {len(data)} bytes where {spec.nbytes} were planned")
        shard[position : position + spec.nbytes] = data
        position += spec.nbytes
    return shard


def index(shards: Sequence[tuple[str, Sequence[TensorSpec]]]) -> bytes:
    """`model.safetensors.index.json`: which shard holds which tensor."""
    weight_map = {spec.name: file for file, specs in shards for spec in specs}
    total = sum(spec.nbytes for _, specs in shards for spec in specs)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
