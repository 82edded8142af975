"""tr(ΔW H ΔWᵀ) of many matrices, from the tiles of the symmetric H on its diagonal and above; no product of
matrices reaches memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, STEP = 128, 64


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """The squared output error that a change of the weights makes, summed over the tokens behind H.

    Args:
        difference: [A, E, N, K], of one dtype with moment: [E, K, K], symmetric. bf16 and f16 are multiplied
        exactly and summed in f32, as f32 is.
    Returns f32 [A, E].
    """
    difference, moment = difference.contiguous(), moment.contiguous()
    alphas, experts, rows, columns = difference.shape
    across, down = triton.cdiv(columns, TILE), triton.cdiv(rows, TILE)
    parts = torch.empty(alphas, experts, across * down, dtype=torch.float32, device=difference.device)
    _sum[(across * down, alphas * experts)](
        difference, moment, parts, experts, rows, columns, across, TILE, STEP, num_warps=8, num_stages=3
    )
    return parts.sum(-1)


@triton.jit
def _sum(
    difference, moment, parts, experts, rows, columns, across, TILE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) % across
    row = tl.program_id(0) // across * TILE + tl.arange(0, TILE)
    column = tile * TILE + tl.arange(0, TILE)
    own = difference + matrix * rows * columns + row[:, None].to(tl.int64) * columns
    square = moment + matrix % experts * columns * columns + column[None, :]
    is_row, is_column = (row < rows)[:, None], (column < columns)[None, :]
    sums = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, (tile + 1) * TILE, STEP):
        inner = first + tl.arange(0, STEP)
        inside = inner < columns
        a = tl.load(own + inner[None, :], mask=is_row & inside[None, :], other=0.0)
        b = tl.load(
            square + inner[:, None].to(tl.int64) * columns, mask=inside[:, None] & is_column, other=0.0
        )
        if first == tile * TILE:
            sums += sums  # tiles above the diagonal stand for their mirror images too
        sums = tl.dot(a, b, sums, input_precision="ieee")
    last = tl.load(own + column[None, :], mask=is_row & is_column, other=0.0).to(tl.float32)
    part = tl.sum(tl.sum(sums * last, 1), 0)
    tl.store(parts + matrix * tl.num_programs(0) + tl.program_id(0), part)
