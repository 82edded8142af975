"""A model folder's tensors as a model has them, whether the files hold them so or quantized.

Whoever reads a `DequantizedSource` meets plain tensors in the model's dtype under plain names; only digests
are of what the files hold. Nothing is written and no more than the tensor that is asked for is in memory.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.model.cast_source import KEYS, NAMES, CastSource, cast_source
from stages.model.dequantize.codes import E2M1
from stages.model.dequantize.detect import SHAPE, Found, find_quantized
from stages.model.dequantize.stated import stated_quantization
from stages.model.matrices import StoredMatrix
from stages.model.plausible import CONFIG, read_config
from stages.model.raw import raw_bytes
from stages.model.weights import TORCH_DTYPES, map_tensor
from state.durable import Bytes
from state.errors import InputError
from state.source import Source, TensorEntry

TORCH_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in TORCH_DTYPES.values()}


@dataclass(frozen=True)
class DequantizedSource(Source):
    """A source whose quantized weights are numbers. held: the files' own tensors. found: what is made of
    them.
    """

    held: Source = field(kw_only=True)
    found: Found = field(kw_only=True)

    @property
    def stored(self) -> Mapping[str, TensorEntry]:
        return self.held.tensors

    @property
    def quantized(self) -> Mapping[str, str]:
        return {name: weight.described for name, weight in self.found.weights.items()}

    def made_from(self, name: str) -> tuple[str, ...]:
        weight = self.found.weights.get(name)
        return self.held.made_from(name) if weight is None else weight.tensors

    def read(self, name: str) -> memoryview:
        return self.private(name) if name in self.found.weights else self.held.read(name)

    def private(self, name: str, index: int | None = None) -> memoryview:
        weight = self.found.weights.get(name)
        return self.held.private(name, index) if weight is None else raw_bytes(weight.read(self.held, index))

    def digest(self, name: str) -> str:
        return self.held.digest(name)

    def digests(self, threads: int) -> dict[str, str]:
        return self.held.digests(threads)

    def require_digested(self, name: str, data: Bytes) -> None:
        if name not in self.found.weights:  # what others are made from was compared as it was read
            self.held.require_digested(name, data)

    def require_unchanged(self) -> None:
        self.held.require_unchanged()


def open_source(folder: Path, dtype: str = "auto") -> Source:
    """The tensors of a model folder, dequantized where they are quantized.

    dtype: what floats are presented in, by torch's name; `auto`: in their own.
    Raises InputError as `Source.open` and `find_quantized` do.
    """
    held, config = Source.open(folder), read_config(folder)
    own = _stated_dtype(config)
    if dtype == "auto" or (own is not None and TORCH_NAMES[own] == dtype):
        return _dequantized(folder, held, config, own or _first_half(held))
    return cast_source(_dequantized(folder, held, config, TORCH_DTYPES[NAMES[dtype]]), dtype)


def _dequantized(folder: Path, held: Source, config: Mapping[str, Any], dtype: torch.dtype) -> Source:
    """A folder's tensors, those that are quantized in `dtype`."""
    stated = stated_quantization(config, str(folder / CONFIG))
    shapes = {name: _integers(held, name) for name in held.tensors if name.endswith(SHAPE)}
    found = find_quantized(held.tensors, shapes, stated, dtype, str(folder))
    if not found.weights:
        return held
    gone = {tensor for weight in found.weights.values() for tensor in weight.tensors}.union(found.spent)
    plain = {name: entry for name, entry in held.tensors.items() if name not in gone}
    made = {name: weight.entry(name, held.tensors[weight.codes]) for name, weight in found.weights.items()}
    return DequantizedSource(folder, dict(sorted((plain | made).items())), held.files, held=held, found=found)


def microscales(source: Source, matrix: StoredMatrix) -> Tensor | None:
    """The exponents of the scales of a matrix that is held in MXFP4, uint8 `[rows, columns / 32]`: one for
    each 32 values of a row. None where it is held otherwise, or its rows are not those that have scales.
    """
    source = _beneath(source)
    weight = source.found.weights.get(matrix.tensor) if isinstance(source, DequantizedSource) else None
    if weight is None or weight.code is not E2M1 or weight.transposed != matrix.transposed:
        return None
    assert isinstance(source, DequantizedSource)
    exponents = map_tensor(source.held, weight.scale, matrix.expert).view(torch.uint8)
    return exponents.reshape(weight.grid)[matrix.rows]


def powers_of_two(exponents: Tensor) -> Tensor:
    """What exponents of e8m0 stand for, float32; 255 is NaN."""
    return exponents.view(torch.float8_e8m0fnu).float()


def told_of_quantized(source: Source) -> list[str]:
    """For people: what of a source is dequantized while it is read, and what is left out with its scales."""
    source = _beneath(source)
    if not isinstance(source, DequantizedSource):
        return []
    schemes = sorted(Counter(source.quantized.values()).items())
    shown = ", ".join(f"{scheme}: {count:,} weights" for scheme, count in schemes)
    told = [f"{source.folder} is quantized ({shown}) and is dequantized while it is read"]
    left = Counter(name.rpartition(".")[2] for name in source.found.spent)
    if left:
        named = ", ".join(f"{count:,} {leaf}" for leaf, count in sorted(left.items()))
        told.append(f"left out, since they go with the quantized weights: {named}")
    return told


def _beneath(source: Source) -> Source:
    """What is cast; a source that is not cast is itself."""
    return source.held if isinstance(source, CastSource) else source


def _integers(source: Source, name: str) -> list[int]:
    tensor: Tensor = map_tensor(source, name)
    if tensor.is_floating_point() or tensor.numel() > 4:
        raise InputError(f"{source.folder}: {name} is no shape ({tensor.dtype}, {tensor.numel()} values)")
    values: list[int] = tensor.flatten().tolist()
    return values


def _stated_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """What the model computes in, as config.json says; None where it does not."""
    named = {name: dtype for dtype, name in TORCH_NAMES.items()}
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in KEYS:
            if part.get(key) in named:
                return named[part[key]]
    return None


def _first_half(source: Source) -> torch.dtype:
    """What the first plain tensor of 16 bits is in."""
    floats = (entry.dtype for entry in source.tensors.values() if entry.dtype in ("BF16", "F16"))
    return TORCH_DTYPES[next(floats, "BF16")]
