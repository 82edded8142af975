"""The weight side of a step of solve/rounding.py: latents to weights, gradients to latents."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.kernels.rounding import NVFP4, round_to

BLOCKS = 128  # of 16 values, of one program
VALUES = 2048  # of one program


def nvfp4_weights(latents: Tensor, scale: Tensor, shared: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1(U) * step in one pass.

    Args:
        latents: f32 [E, N, K], K a multiple of 16. scale: float8_e4m3fn [E, N, K / 16]. shared: f32 [E].
        dtype: of the result, to which f32 is rounded.
    """
    weights = torch.empty(latents.shape, dtype=dtype, device=latents.device)
    experts = len(latents)
    blocks = latents[0].numel() // 16
    _weights[(triton.cdiv(blocks, BLOCKS), experts)](
        latents.contiguous(),
        scale.contiguous(),
        shared.contiguous(),
        weights,
        blocks,
        BLOCKS,
        enable_fp_fusion=False,
    )
    return weights


@triton.jit
def _weights(latents, scale, shared, weights, blocks, BLOCKS: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    own = expert * blocks + block
    place = own[:, None] * 16 + tl.arange(0, 16)[None, :]
    step = tl.load(scale + own, mask=inside, other=0.0).to(tl.float32) * tl.load(shared + expert)
    values = tl.load(latents + place, mask=inside[:, None], other=0.0)
    result = round_to(values, NVFP4) * step[:, None]
    tl.store(weights + place, result.to(weights.dtype.element_ty), mask=inside[:, None])


def sign_step(latents: Tensor, momentum: Tensor, gradient: Tensor, weight: float, rate: float) -> None:
    """m ← m + weight (g - m); U ← U - rate sign(m), both in place.

    Args:
        latents, momentum: f32, contiguous. gradient: of the same shape, in any dtype.
    """
    count = latents.numel()
    _step[(triton.cdiv(count, VALUES),)](
        latents, momentum, gradient.contiguous(), weight, rate, count, VALUES, enable_fp_fusion=False
    )


@triton.jit
def _step(latents, momentum, gradient, weight, rate, count, VALUES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = place < count
    mean = tl.load(momentum + place, mask=inside, other=0.0)
    mean = mean + weight * (tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) - mean)
    value = tl.load(latents + place, mask=inside, other=0.0)
    moved = tl.where(mean > 0.0, value - rate, tl.where(mean < 0.0, value + rate, value))
    tl.store(momentum + place, mean, mask=inside)
    tl.store(latents + place, moved, mask=inside)
