"""Q(W s) / s - W for NVFP4, in one read and one write of the weights: what AWQ judges every candidate by."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.kernels.rounding import NVFP4, nvfp4_step, round_to

ROWS, BLOCKS = 16, 4  # of one tile


def scaled_difference(weights: Tensor, scales: Tensor, shared: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to nearest changes in weights that are scaled by their input channel.

    Args:
        weights: [E, N, K], K a multiple of 16. scales: f32 [A, E, K], the candidates. shared: f32 [A, E], the
        global scale of weights * scales. dtype: of the result, to which f32 is rounded.
    Returns [A, E, N, K].
    """
    weights, scales = weights.contiguous(), scales.contiguous()
    experts, rows, columns = weights.shape
    difference = torch.empty(*shared.shape, rows, columns, dtype=dtype, device=weights.device)
    grid = (triton.cdiv(columns, 16 * BLOCKS), triton.cdiv(rows, ROWS), shared.numel())
    _difference[grid](
        weights,
        scales,
        shared.contiguous(),
        difference,
        experts,
        rows,
        columns,
        ROWS,
        BLOCKS,
        enable_fp_fusion=False,
    )
    return difference


@triton.jit
def _difference(
    weights, scales, shared, difference, experts, rows, columns, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    expert = matrix % experts
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    place = row[:, None, None].to(tl.int64) * columns + column[None, :, :]
    w = tl.load(weights + expert * rows * columns + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(scales + matrix * columns + column, mask=column < columns, other=1.0)[None, :, :]
    scaled = w * s
    step = nvfp4_step(tl.max(tl.abs(scaled), 2), tl.load(shared + matrix))[:, :, None]
    rounded = round_to(tl.div_rn(scaled, tl.broadcast_to(step, scaled.shape)), NVFP4) * step
    changed = tl.div_rn(rounded, tl.broadcast_to(s, scaled.shape)) - w
    tl.store(difference + matrix * rows * columns + place, changed, mask=inside)
