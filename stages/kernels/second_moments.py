"""H += xᵀx for every expert at once, from rows sorted by expert."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_second_moments(totals: Tensor, rows: Tensor, ends: Tensor | None) -> None:
    """Add Σ xxᵀ of each expert's rows to totals, in place.

    Args:
        totals: f32 [experts, channels, channels], contiguous.
        rows: [tokens, channels]; bf16 and f16 are multiplied exactly and summed in f32, as f32 is.
        ends: int [experts], cumulative; None where all rows are one site's.

    Half of the tiles are computed, the others are their mirror images.
    """
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    channels = rows.shape[1]
    tile, step = (64, 32) if rows.dtype == torch.float32 else (128, 64)
    pairs = tile_pairs(-(-channels // tile), rows.device)
    _add[(pairs.shape[1], len(totals))](
        rows,
        rows if ends is None else ends,
        len(rows),
        totals,
        pairs,
        pairs.shape[1],
        channels,
        rows.stride(0),
        ends is not None,
        tile,
        step,
        num_warps=4,
        num_stages=3,
    )


@cache
def tile_pairs(tiles: int, device: torch.device) -> Tensor:
    """Row and column of every tile on or below the diagonal: int32 [2, pairs]."""
    return torch.tril_indices(tiles, tiles, dtype=torch.int32, device=device)


@triton.jit
def _add(
    rows, ends, rows_in_all, totals, pairs, count, channels, stride,
    SORTED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end = 0, rows_in_all
    if SORTED:
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
    if start >= end:
        return
    i = tl.load(pairs + tl.program_id(0))
    j = tl.load(pairs + count + tl.program_id(0))
    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE, TILE], tl.float32)
    for first in range(start, end, STEP):
        index = first + tl.arange(0, STEP)
        base = rows + index[:, None].to(tl.int64) * stride
        valid = (index < end)[:, None]
        a = tl.load(base + left[None, :], mask=valid & (left < channels)[None, :], other=0.0)
        b = tl.load(base + right[None, :], mask=valid & (right < channels)[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
    # On and below the diagonal; above it is its mirror image, to the bit.
    inside = (left < channels)[:, None] & (left[:, None] >= right[None, :])
    matrix = totals + expert.to(tl.int64) * channels * channels
    place = matrix + left[:, None] * channels + right[None, :]
    sums += tl.load(place, mask=inside, other=0.0)
    tl.store(place, sums, mask=inside)
    tl.store(matrix + right[None, :] * channels + left[:, None], sums, mask=inside)
