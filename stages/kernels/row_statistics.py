"""The largest |x| and the sum of |x| per channel, added to what was seen before in one read of the rows.

Routers send some experts many times the tokens of others, so the rows are cut into parts of equal length; the
last program of an expert to finish adds its parts, in order: nothing depends on which program that is, and a
repeated run gives the same bits.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

PARTS = 16  # added at a time


@dataclass(frozen=True)
class Tiles:
    """How rows are cut. part: rows of a program. channels, rows: of a tile. unroll: tiles loaded at once."""

    part: int
    channels: int
    rows: int
    unroll: int
    warps: int


# What was fastest on an H200: few programs for the many rows of experts, enough of them for one site.
EXPERTS, SITE = Tiles(1024, 64, 16, 8, 4), Tiles(512, 32, 32, 4, 4)


def add_groups(amax: Tensor, total: Tensor, tokens: Tensor, rows: Tensor, ends: Tensor) -> None:
    """Add rows sorted by expert.

    Args:
        amax: f32 [experts, channels], total: f64 [experts, channels], tokens: int64 [experts]; changed.
        rows: [assignments, channels] of any float dtype. ends: int [experts], cumulative.

    A NaN makes its amax and total NaN.
    """
    _add(amax, total, tokens, rows, ends, len(ends), EXPERTS)


def add_rows(amax: Tensor, total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Add rows [tokens, channels] of one site: amax f32 [channels], total f64 [channels], tokens int64 []."""
    _add(amax, total, tokens, rows, None, 1, SITE)


def _add(
    amax: Tensor,
    total: Tensor,
    tokens: Tensor,
    rows: Tensor,
    ends: Tensor | None,
    experts: int,
    tiles: Tiles,
) -> None:
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    count, channels = rows.shape
    wasted = 0 if ends is None else experts  # parts at the most, one per expert
    # Plain arithmetic: Triton's own helpers take longer than a launch.
    parts = -(-count // tiles.part) + wasted
    if not parts:
        return
    across = -(-channels // tiles.channels)
    _add_parts[(across, parts)](
        rows, rows if ends is None else ends, *_scratch(rows.device, parts * channels, across * experts),
        amax, total, tokens, count, channels, rows.stride(0), experts,
        _power_of_2(experts), ends is not None,
        tiles.part, tiles.channels, tiles.rows, tiles.unroll, PARTS, num_warps=tiles.warps,
    )  # fmt: skip


def _power_of_2(least: int) -> int:
    """The smallest one that is not below `least`."""
    return 1 << (least - 1).bit_length()


def _scratch(device: torch.device, values: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the maxima (int32) and the sums (f64) of parts, and counters of finished parts (int32), which
    are zeros and which the kernel leaves zeros. Kept for more launches of these sizes on this stream, which
    run one after another.
    """
    stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    return _kept(device, stream, _power_of_2(values), _power_of_2(counters))


@cache
def _kept(device: torch.device, _stream: int, values: int, counters: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(values, dtype=torch.int32, device=device),
        torch.empty(values, dtype=torch.float64, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )


@triton.jit
def _add_parts(
    rows, ends, maxima, sums, finished, amax, total, tokens, count, channels, stride, experts,
    EXPERTS: tl.constexpr, SORTED: tl.constexpr, PART: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    # Whose part it is, where that expert's rows are, and how many parts come before and up to its last.
    owner, start, end, before, upto = 0, 0, count, 0, (count + PART - 1) // PART
    if SORTED:
        expert = tl.arange(0, EXPERTS)
        starts = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
        stops = tl.load(ends + expert, mask=expert < experts, other=0)
        parts = tl.where(expert < experts, (stops - starts + PART - 1) // PART, 0)
        cumulated = tl.cumsum(parts, 0)
        own = (cumulated - parts <= part) & (part < cumulated)
        owner = tl.sum(tl.where(own, expert, 0), 0)
        start, end = tl.sum(tl.where(own, starts, 0), 0), tl.sum(tl.where(own, stops, 0), 0)
        before, upto = tl.sum(tl.where(own, cumulated - parts, 0), 0), tl.sum(tl.where(own, cumulated, 0), 0)
    if part >= upto:
        return
    first = start + (part - before) * PART
    last = tl.minimum(first + PART, end)
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    # Magnitudes are compared by their bits: in the same order, and a NaN is above all numbers.
    largest = tl.zeros([ROWS, CHANNELS], tl.int32)
    summed = tl.zeros([ROWS, CHANNELS], tl.float64)
    for offset in range(first, last, ROWS * UNROLL):
        for step in tl.static_range(UNROLL):
            index = offset + step * ROWS + tl.arange(0, ROWS)
            place = index[:, None].to(tl.int64) * stride + columns[None, :]
            values = tl.load(rows + place, mask=(index < last)[:, None] & inside[None, :], other=0.0)
            magnitudes = tl.abs(values.to(tl.float32))
            largest = tl.maximum(largest, magnitudes.to(tl.int32, bitcast=True))
            summed += magnitudes.to(tl.float64)
    tl.store(maxima + part * channels + columns, tl.max(largest, 0), mask=inside)
    tl.store(sums + part * channels + columns, tl.sum(summed, 0), mask=inside)
    tl.debug_barrier()  # all threads have stored before one of them counts the part
    counter = finished + owner * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") + 1 < upto - before:
        return
    tl.store(counter, 0)

    highest = tl.zeros([PARTS, CHANNELS], tl.int32)
    added = tl.zeros([PARTS, CHANNELS], tl.float64)
    for other in range(before, upto, PARTS):
        index = other + tl.arange(0, PARTS)
        valid = (index < upto)[:, None] & inside[None, :]
        place = index[:, None] * channels + columns[None, :]
        highest = tl.maximum(highest, tl.load(maxima + place, mask=valid, other=0, cache_modifier=".cg"))
        added += tl.load(sums + place, mask=valid, other=0.0, cache_modifier=".cg")
    place = owner * channels + columns
    known = tl.load(amax + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    highest_of_all = tl.maximum(tl.max(highest, 0), known).to(tl.float32, bitcast=True)
    tl.store(amax + place, highest_of_all, mask=inside)
    summed_before = tl.load(total + place, mask=inside, other=0.0)
    tl.store(total + place, tl.sum(added, 0) + summed_before, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tokens + owner, tl.load(tokens + owner) + end - start)
