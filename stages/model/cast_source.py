"""A model folder's tensors in another dtype than its files hold them in (`--dtype`).

A checkpoint that was made for float16 may overflow where bfloat16 does not. Whoever reads a `CastSource`
meets the tensors as if the files held them in the other dtype; only digests are of what the files hold.
Nothing is written.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from stages.model.raw import raw_bytes
from stages.model.weights import TORCH_DTYPES, largest_magnitude, map_tensor
from state.durable import Bytes
from state.errors import InputError
from state.source import Source, TensorEntry

HALVES = ("BF16", "F16")
FLOATS = (*HALVES, "F32")
"""Safetensors' names of the dtypes that are cast, and to which."""

NAMES = {str(TORCH_DTYPES[name]).removeprefix("torch."): name for name in FLOATS}
"""torch's name → safetensors'."""

KEYS = ("dtype", "torch_dtype")
"""What configurations call the dtype that a model computes in; the second is the older name."""


@dataclass(frozen=True)
class CastSource(Source):
    """A source whose floats are rounded to another dtype as they are read.

    held: the source beneath. dtype: torch's name of the dtype. cast: the tensors that change.
    """

    held: Source = field(kw_only=True)
    dtype: str = field(kw_only=True)
    cast: frozenset[str] = field(kw_only=True)

    @property
    def stored(self) -> Mapping[str, TensorEntry]:
        return self.held.stored

    @property
    def quantized(self) -> Mapping[str, str]:
        return self.held.quantized

    def made_from(self, name: str) -> tuple[str, ...]:
        return self.held.made_from(name)

    def read(self, name: str) -> memoryview:
        return self.private(name) if name in self.cast else self.held.read(name)

    def private(self, name: str, index: int | None = None) -> memoryview:
        return raw_bytes(self._cast(name, index)) if name in self.cast else self.held.private(name, index)

    def _cast(self, name: str, index: int | None) -> Tensor:
        result = map_tensor(self.held, name, index).to(TORCH_DTYPES[self.tensors[name].dtype])
        if index is None:  # after the values were taken: what is written from here on is not in them
            self.held.require_digested(name, self.held.read(name))
        return result

    def digest(self, name: str) -> str:
        return self.held.digest(name)

    def digests(self, threads: int) -> dict[str, str]:
        return self.held.digests(threads)

    def require_digested(self, name: str, data: Bytes) -> None:
        if name not in self.cast:  # what others are made from was compared as it was read
            self.held.require_digested(name, data)

    def require_unchanged(self) -> None:
        self.held.require_unchanged()


def cast_source(held: Source, dtype: str) -> CastSource:
    """A source with its floats in `dtype`, torch's name: all but those that are made from quantized tensors,
    and float32 ones in a checkpoint most of whose values are not, which were kept wide on purpose.
    """
    plain = [e for e in held.tensors.values() if e.dtype in FLOATS and e.name not in held.quantized]
    values = Counter[str]()
    for entry in plain:
        values[entry.dtype] += prod(entry.shape)
    most = max(values, key=values.__getitem__, default=None)
    wanted = NAMES[dtype]
    cast = {e.name: e for e in plain if e.dtype != wanted and (e.dtype in HALVES or e.dtype == most)}
    size = TORCH_DTYPES[wanted].itemsize
    changed = {
        name: replace(entry, dtype=wanted, nbytes=prod(entry.shape) * size) for name, entry in cast.items()
    }
    return CastSource(
        held.folder, held.tensors | changed, held.files, held=held, dtype=dtype, cast=frozenset(cast)
    )


def dtype_asked(source: Source) -> str | None:
    """torch's name of the dtype that a source is presented in; None where it is the source's own."""
    return source.dtype if isinstance(source, CastSource) else None


def require_held_by_dtype(source: Source) -> None:
    """Raise InputError naming the first tensor that a cast would make infinite: float16 ends at 65504. Reads
    all tensors that are cast to it.
    """
    if not isinstance(source, CastSource) or source.dtype != "float16":
        return
    for name in source.cast:
        largest = largest_magnitude(map_tensor(source.held, name).reshape(-1))
        if bool(largest.isfinite()) and not bool(largest.half().isfinite()):
            raise InputError(
                f"{name} reaches {largest.item():g}, and float16 ends at 65504; give --dtype bfloat16 or "
                "leave --dtype out"
            )


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of the same model in another dtype: wherever it names one, in its parts too. One that names
    none gets it under the name that all readers know.
    """
    changed = _replaced(config, dtype)
    return changed if any(key in changed for key in KEYS) else changed | {"torch_dtype": dtype}


def _replaced(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    def value(key: str, held: Any) -> Any:
        if isinstance(held, Mapping):
            return _replaced(held, dtype)
        return dtype if key in KEYS and (held is None or held in NAMES) else held

    return {key: value(key, held) for key, held in config.items()}


def set_dtype(config: Any, dtype: str) -> None:
    """Have transformers build the model of a configuration, and every part of it, in a dtype."""
    config.dtype = getattr(torch, dtype)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            set_dtype(part, dtype)


def told_of_cast(source: Source) -> list[str]:
    """For people: that tensors are cast as they are read."""
    if not isinstance(source, CastSource):
        return []
    held = ", ".join(sorted({source.held.tensors[name].dtype for name in source.cast})) or "none"
    return [
        f"{source.folder} is loaded in {source.dtype}: {len(source.cast):,} tensors are cast as they are "
        f"read (stored in {held})"
    ]
