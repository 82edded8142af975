"""Tensors of the source checkpoint as torch tensors."""

import numpy as np
import torch

from stages.model.raw import raw_bytes
from state.errors import InputError
from state.source import Source, TensorEntry

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Of the floats that a model computes in, by safetensors' name."""

OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor in its stored dtype and shape, copied into memory of its own.

    Raises:
        InputError: torch does not have the dtype.
        IdentityMismatch: the copy is not what was digested, where it was (see `Source.digests`).
    """
    tensor = map_tensor(source, name).clone()
    source.require_digested(name, raw_bytes(tensor))
    return tensor


def map_tensor(source: Source, name: str, index: int | None = None) -> torch.Tensor:
    """A tensor, or one index into its first axis, as a private mapping of the checkpoint where that holds it
    so: then it takes no memory that can't be reclaimed. One that is made of codes takes memory of its own.

    Raises InputError for a dtype that torch does not have.
    """
    entry = source.tensors[name]
    dtype = dtype_of(entry)
    raw = np.frombuffer(source.private(name, index), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape if index is None else entry.shape[1:])


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """torch's dtype of a tensor. Raises InputError for one that torch does not have."""
    dtype = TORCH_DTYPES.get(entry.dtype) or OTHER_DTYPES.get(entry.dtype)
    if dtype is None:
        raise InputError(
            f"{entry.name} is {entry.dtype}, which can't be read; give an unquantized model as MODEL"
        )
    return dtype


def largest_magnitude(values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """max |x| along the last axis, float32, without a copy of the values; in `out` where it is given."""
    if out is None:
        out = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    if values.is_cuda:  # one kernel instead of six
        torch.linalg.vector_norm(values.detach(), torch.inf, dim=-1, dtype=torch.float32, out=out)
        return out
    # Each row by itself, since they are few and long: `aminmax` along an axis is 30 times slower.
    extremes = [torch.aminmax(row) for row in values.detach().reshape(-1, values.shape[-1])]
    low = torch.stack([found.min for found in extremes]).float()
    high = torch.stack([found.max for found in extremes]).float()
    return out.copy_(torch.maximum(-low, high).view_as(out))
