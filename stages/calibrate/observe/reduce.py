"""Reductions over tokens: the largest |x| and the sum of |x| per channel, for one site or for all experts of
a layer at once, added to what was seen before.

Maxima are exact. Sums run in float64, so that they agree after rounding to float32 however tokens were split
into batches.
"""

from dataclasses import dataclass

import torch

CPU_ROWS = (
    256  # rows reduced at a time on a CPU: the float64 copy stays in cache, three times faster than one pass
)


@dataclass(frozen=True)
class Seen:
    """Statistics of one site, or of the experts of a layer, changed in place.

    amax: float32 [channels] or [experts, channels]. total: Σ|x|, float64, likewise. tokens: int64 [] or
    [experts].
    """

    amax: torch.Tensor
    total: torch.Tensor
    tokens: torch.Tensor


def add_rows(seen: Seen, rows: torch.Tensor) -> None:
    """Add the tokens of one site: rows [tokens, channels] of any float dtype. A NaN makes its amax and total
    NaN.
    """
    if rows.is_cuda:
        from stages.kernels import row_statistics

        row_statistics.add_rows(seen.amax, seen.total, seen.tokens, rows)
        return
    for chunk in rows.split(CPU_ROWS) if len(rows) else ():
        magnitudes = chunk.abs()
        torch.maximum(seen.amax, magnitudes.amax(0), out=seen.amax)
        seen.total.add_(magnitudes.double().sum(0))
    seen.tokens.add_(len(rows))


def add_groups(seen: Seen, rows: torch.Tensor, ends: torch.Tensor) -> None:
    """Add rows sorted by expert.

    Args:
        rows: [assignments, channels]; rows of expert e are ends[e - 1] up to ends[e].
        ends: int [experts], cumulative. Rows past the last end belong to no expert and are left out.
    """
    if rows.is_cuda:
        from stages.kernels import row_statistics

        row_statistics.add_groups(seen.amax, seen.total, seen.tokens, rows, ends)
        return
    start = 0
    for expert, end in enumerate(ends.tolist()):
        add_rows(Seen(seen.amax[expert], seen.total[expert], seen.tokens[expert]), rows[start:end])
        start = end
