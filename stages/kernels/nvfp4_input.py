"""Inputs as engines round them to NVFP4, in one read and one write: `Nvfp4.round_input` on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.kernels.rounding import NVFP4, round_e4m3_magnitude, round_to

BLOCKS = 128  # of one program


def round_blocks(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded in blocks of 16 along its last axis.

    Args:
        x: [..., K], K a multiple of 16. scale: f32 [], of the whole input.
    Returns the same shape and dtype.
    """
    x = x.contiguous()
    rounded = torch.empty_like(x)
    blocks = x.numel() // 16
    _round[(triton.cdiv(blocks, BLOCKS),)](x, scale, rounded, blocks, BLOCKS, enable_fp_fusion=False)
    return rounded


@triton.jit
def _round(x, scale, rounded, blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (block < blocks)[:, None] & (place >= 0)
    shared = tl.load(scale)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    stored = round_e4m3_magnitude(tl.div_rn(tl.max(tl.abs(values), 1), 6.0 * shared))
    step = (stored * shared)[:, None]
    divisor = tl.broadcast_to(tl.where(step == 0.0, 1.0, step), values.shape)
    result = round_to(tl.div_rn(values, divisor), NVFP4) * step
    tl.store(rounded + place, result.to(rounded.dtype.element_ty), mask=inside)
