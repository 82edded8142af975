"""Tensors of the source checkpoint as torch tensors."""

import numpy as np
import torch
from safetensors import safe_open

from state.source import Source

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_tensor(source: Source, name: str) -> torch.Tensor:
    """A float tensor in its stored dtype and shape, copied into memory of its own."""
    entry = source.tensors[name]
    raw = np.frombuffer(source.read(name), dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def map_tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor in its stored dtype and shape, as a private mapping of the checkpoint: it takes no memory that
    can't be reclaimed.
    """
    with safe_open(source.folder / source.tensors[name].file, framework="pt") as handle:
        mapped: torch.Tensor = handle.get_tensor(name)
        return mapped


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
