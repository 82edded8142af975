"""The largest |x| and the sum of |x| per channel, added to what was seen before in one read of the rows.

Routers send some experts many times the tokens of others, so the rows are cut into parts of equal length, and
each expert's parts are then added in order: nothing depends on which program ends first, and a repeated run
gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 512  # rows of one program
CHANNELS, ROWS = 64, 64  # of one tile
PARTS = 16  # added at a time


def add_groups(amax: Tensor, total: Tensor, tokens: Tensor, rows: Tensor, ends: Tensor) -> None:
    """Add rows sorted by expert.

    Args:
        amax: f32 [experts, channels], total: f64 [experts, channels], tokens: int64 [experts]; changed.
        rows: [assignments, channels] of any float dtype. ends: int [experts], cumulative.

    A NaN makes its amax and total NaN.
    """
    _add(amax, total, tokens, rows, ends, len(ends), sorted_rows=True)


def add_rows(amax: Tensor, total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Add rows [tokens, channels] of one site: amax f32 [channels], total f64 [channels], tokens int64 []."""
    _add(amax, total, tokens, rows, rows, 1, sorted_rows=False)


def _add(
    amax: Tensor, total: Tensor, tokens: Tensor, rows: Tensor, ends: Tensor, experts: int, sorted_rows: bool
) -> None:
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    count, channels = rows.shape
    parts = triton.cdiv(count, PART) + experts  # no expert wastes more than one
    maxima = torch.empty(parts, channels, dtype=torch.float32, device=rows.device)
    sums = torch.empty(parts, channels, dtype=torch.float64, device=rows.device)
    across, padded = triton.cdiv(channels, CHANNELS), triton.next_power_of_2(experts)
    _reduce_parts[(across, parts)](
        rows, ends, maxima, sums, count, channels, rows.stride(0), experts,
        padded, sorted_rows, PART, CHANNELS, ROWS,
    )  # fmt: skip
    _add_parts[(across, experts)](
        ends, maxima, sums, amax, total, tokens, count, channels, experts,
        padded, sorted_rows, PART, CHANNELS, PARTS,
    )  # fmt: skip


@triton.jit
def _parts(ends, count, experts, EXPERTS: tl.constexpr, SORTED: tl.constexpr, PART: tl.constexpr):
    """Of each expert: where its rows start and end, and its parts before and after it are counted."""
    expert = tl.arange(0, EXPERTS)
    if SORTED:
        start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
        end = tl.load(ends + expert, mask=expert < experts, other=0)
    else:
        start = tl.zeros([EXPERTS], tl.int32)
        end = start + count
    parts = tl.where(expert < experts, (end - start + PART - 1) // PART, 0)
    upto = tl.cumsum(parts, 0)
    return start, end, upto - parts, upto


@triton.jit
def _reduce_parts(
    rows, ends, maxima, sums, count, channels, stride, experts,
    EXPERTS: tl.constexpr, SORTED: tl.constexpr,
    PART: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    start, end, before, upto = _parts(ends, count, experts, EXPERTS, SORTED, PART)
    own = (before <= part) & (part < upto)
    first = tl.sum(tl.where(own, start + (part - before) * PART, 0), 0)
    last = tl.minimum(first + PART, tl.sum(tl.where(own, end, 0), 0))
    if first >= last:
        return
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    largest = tl.zeros([ROWS, CHANNELS], tl.float32)
    summed = tl.zeros([ROWS, CHANNELS], tl.float64)
    for offset in range(0, PART, ROWS):
        index = first + offset + tl.arange(0, ROWS)
        place = index[:, None].to(tl.int64) * stride + columns[None, :]
        values = tl.load(rows + place, mask=(index < last)[:, None] & inside[None, :], other=0.0)
        magnitudes = tl.abs(values.to(tl.float32))
        largest = tl.maximum(largest, magnitudes)
        summed += magnitudes.to(tl.float64)
    # Maxima pass NaN over, sums do not.
    tl.store(maxima + part * channels + columns, tl.max(largest, 0), mask=inside)
    tl.store(sums + part * channels + columns, tl.sum(summed, 0), mask=inside)


@triton.jit
def _add_parts(
    ends, maxima, sums, amax, total, tokens, count, channels, experts,
    EXPERTS: tl.constexpr, SORTED: tl.constexpr,
    PART: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start, end, before, upto = _parts(ends, count, experts, EXPERTS, SORTED, PART)
    own = tl.arange(0, EXPERTS) == expert
    seen = tl.sum(tl.where(own, end - start, 0), 0)
    if seen <= 0:
        return
    first, last = tl.sum(tl.where(own, before, 0), 0), tl.sum(tl.where(own, upto, 0), 0)
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    largest = tl.zeros([PARTS, CHANNELS], tl.float32)
    summed = tl.zeros([PARTS, CHANNELS], tl.float64)
    for part in range(first, last, PARTS):
        index = part + tl.arange(0, PARTS)
        valid = (index < last)[:, None] & inside[None, :]
        place = index[:, None] * channels + columns[None, :]
        largest = tl.maximum(largest, tl.load(maxima + place, mask=valid, other=0.0))
        summed += tl.load(sums + place, mask=valid, other=0.0)
    place = expert.to(tl.int64) * channels + columns
    summed_before = tl.load(total + place, mask=inside, other=0.0)
    after = tl.sum(summed, 0) + summed_before
    highest = tl.maximum(tl.max(largest, 0), tl.load(amax + place, mask=inside, other=0.0))
    # A sum of magnitudes is NaN only where one of them is.
    tl.store(amax + place, tl.where(after == after, highest, float("nan")), mask=inside)
    tl.store(total + place, after, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tokens + expert, tl.load(tokens + expert) + seen)
