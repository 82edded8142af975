"""The scale of each NVFP4 block: all ratios to clip by, or all scales, tried on weights read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.kernels.rounding import NVFP4, nvfp4_step, round_to

ROWS = 64  # of one tile


def clip_blocks(weights: Tensor, within: Tensor, shared: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Judge a block's clipped amax by Δ_b H_bb Δ_bᵀ, and keep the first ratio of least loss.

    Args:
        weights: [E, N, K]. within: f32 [E, K / 16, 16, 16], H's blocks on the diagonal. shared: f32 [E],
        the global scale. ratios: f32 [R].
    Returns the clipped amax and its loss, f32 [E, N, K / 16] both.
    """
    return _try(weights, within, shared, ratios, are_scales=False)


def sweep_blocks(weights: Tensor, within: Tensor, shared: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`clip_blocks` for block scales themselves, f32 [S], which e4m3 holds: the first one of least loss, and
    its loss.
    """
    return _try(weights, within, shared, scales, are_scales=True)


def _try(
    weights: Tensor, within: Tensor, shared: Tensor, tried: Tensor, are_scales: bool
) -> tuple[Tensor, Tensor]:
    weights = weights.contiguous()
    experts, rows, columns = weights.shape
    best = torch.empty(experts, rows, columns // 16, dtype=torch.float32, device=weights.device)
    losses = torch.empty_like(best)
    _clip[(triton.cdiv(rows, ROWS), columns // 16, experts)](
        weights,
        within.contiguous(),
        shared.contiguous(),
        tried,
        best,
        losses,
        rows,
        columns,
        len(tried),
        are_scales,
        ROWS,
        enable_fp_fusion=False,
    )
    return best, losses


@triton.jit
def _clip(
    weights, within, shared, tried, found, losses, rows, columns,
    COUNT: tl.constexpr, ARE_SCALES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lanes = tl.arange(0, 16)
    place = (expert * rows + row)[:, None] * columns + block * 16 + lanes[None, :]
    w = tl.load(weights + place, mask=inside[:, None], other=0.0).to(tl.float32)
    square = (expert * (columns // 16) + block) * 256 + lanes[:, None] * 16 + lanes[None, :]
    moment = tl.load(within + square)
    common = tl.load(shared + expert)
    own = tl.max(tl.abs(w), 1)
    best = own
    least = tl.full([ROWS], float("inf"), tl.float32)
    for number in range(COUNT):
        value = tl.load(tried + number)
        if ARE_SCALES:
            candidate = tl.broadcast_to(value, own.shape)
            step_of_row = candidate * common
        else:
            candidate = own * value
            step_of_row = nvfp4_step(candidate, common)
        step = tl.broadcast_to(step_of_row[:, None], w.shape)
        difference = round_to(tl.div_rn(w, step), NVFP4) * step - w
        loss = tl.sum(tl.dot(difference, moment, input_precision="ieee") * difference, 1)
        better = loss < least
        least = tl.where(better, loss, least)
        best = tl.where(better, candidate, best)
    result = (expert * rows + row) * (columns // 16) + block
    tl.store(found + result, best, mask=inside)
    tl.store(losses + result, least, mask=inside)
