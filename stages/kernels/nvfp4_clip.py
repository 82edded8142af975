"""The ratio to clip each NVFP4 block by: all ratios tried on weights that are read once."""

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
    weights = weights.contiguous()
    experts, rows, columns = weights.shape
    amax = torch.empty(experts, rows, columns // 16, dtype=torch.float32, device=weights.device)
    losses = torch.empty_like(amax)
    _clip[(triton.cdiv(rows, ROWS), columns // 16, experts)](
        weights,
        within.contiguous(),
        shared.contiguous(),
        ratios,
        amax,
        losses,
        rows,
        columns,
        len(ratios),
        ROWS,
        enable_fp_fusion=False,
    )
    return amax, losses


@triton.jit
def _clip(
    weights, within, shared, ratios, amax, losses, rows, columns, RATIOS: tl.constexpr, ROWS: tl.constexpr
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
    for number in range(RATIOS):
        clipped = own * tl.load(ratios + number)
        step = tl.broadcast_to(nvfp4_step(clipped, common)[:, None], w.shape)
        difference = round_to(tl.div_rn(w, step), NVFP4) * step - w
        loss = tl.sum(tl.dot(difference, moment, input_precision="ieee") * difference, 1)
        better = loss < least
        least = tl.where(better, loss, least)
        best = tl.where(better, clipped, best)
    result = (expert * rows + row) * (columns // 16) + block
    tl.store(amax + result, best, mask=inside)
    tl.store(losses + result, least, mask=inside)
