"""Q(W s) / s - W for NVFP4, in one read and one write of the weights: what AWQ judges every candidate by."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.calibrate.kernels.rounding import NVFP4, nvfp4_step, round_to

ROWS, BLOCKS = 16, 4  # of one tile


def scaled_difference(weights: Tensor, scale: Tensor, shared: Tensor) -> Tensor:
    """What rounding to nearest changes in weights that are scaled by their input channel.

    Args:
        weights: [E, N, K], K a multiple of 16. scale: f32 [E, K]. shared: f32 [E], the global scale of
        weights * scale.
    Returns f32 [E, N, K].
    """
    weights, scale = weights.contiguous(), scale.contiguous()
    experts, rows, columns = weights.shape
    difference = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    grid = (triton.cdiv(columns, 16 * BLOCKS), triton.cdiv(rows, ROWS), experts)
    _difference[grid](
        weights, scale, shared.contiguous(), difference, rows, columns, ROWS, BLOCKS, enable_fp_fusion=False
    )
    return difference


@triton.jit
def _difference(
    weights, scale, shared, difference, rows, columns, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    place = (expert * rows + row)[:, None, None] * columns + column[None, :, :]
    w = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(scale + expert * columns + column, mask=column < columns, other=1.0)[None, :, :]
    scaled = w * s
    step = nvfp4_step(tl.max(tl.abs(scaled), 2), tl.load(shared + expert))[:, :, None]
    rounded = round_to(tl.div_rn(scaled, tl.broadcast_to(step, scaled.shape)), NVFP4) * step
    tl.store(difference + place, tl.div_rn(rounded, tl.broadcast_to(s, scaled.shape)) - w, mask=inside)
