"""Reductions over tokens: the largest |x| and the sum of |x| per channel, for one site or for all experts of
a layer at once.

Maxima are exact. Sums run in float64, so that they agree after rounding to float32 however tokens were split
into batches.
"""

import torch

CPU_ROWS = (
    256  # rows reduced at a time on a CPU: the float64 copy stays in cache, three times faster than one pass
)
GPU_ELEMENTS = 1 << 27  # reduced at a time on a GPU: their float64 copy takes 1 GiB


def reduce_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce [tokens, channels] of any float dtype to (amax [channels] in that dtype, sum |x| float64
    [channels]).
    """
    if rows.device.type != "cpu":
        magnitudes = rows.abs()
        return magnitudes.amax(0), magnitudes.sum(0, dtype=torch.float64)
    amax = torch.zeros(rows.shape[1], dtype=rows.dtype)
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for chunk in rows.split(CPU_ROWS) if len(rows) else ():
        magnitudes = chunk.abs()
        torch.maximum(amax, magnitudes.amax(0), out=amax)
        total += magnitudes.double().sum(0)
    return amax, total


def reduce_groups(rows: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce rows sorted by expert.

    Args:
        rows: [assignments, channels]; rows of expert e are ends[e - 1] up to ends[e].
        ends: int [experts], cumulative. Rows past the last end belong to no expert and are left out.
    Returns (amax [experts, channels] in the rows' dtype, sum |x| float64 [experts, channels], tokens int64
    [experts]). Where an expert has no row, its amax and sum are zero and its tokens are zero.
    """
    ends = ends.to(torch.int64)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    if rows.device.type == "cpu":
        parts = [reduce_rows(part) for part in rows[: int(ends[-1])].split(lengths.tolist())]
        return torch.stack([amax for amax, _ in parts]), torch.stack([total for _, total in parts]), lengths
    offsets = torch.cat([ends.new_zeros(1), ends])
    maxima, totals = [], []
    for columns in rows.split(max(1, GPU_ELEMENTS // max(rows.shape[0], 1)), dim=1):
        magnitudes = columns.abs()
        maxima.append(torch.segment_reduce(magnitudes, "max", offsets=offsets, axis=0, initial=0))
        totals.append(torch.segment_reduce(magnitudes.double(), "sum", offsets=offsets, axis=0, initial=0))
    return torch.cat(maxima, 1), torch.cat(totals, 1), lengths
