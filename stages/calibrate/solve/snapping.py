"""Scales that a norm can hold exactly: the folded norm weight is rounded first, and the scale follows from it."""

import torch
from torch import Tensor

# A norm weight near zero (near -1 where the norm adds one) rounds so coarsely that the scale it leads to is no longer
# the one that was asked for. Such channels keep scale 1.
LARGEST_SHIFT = 2.0


def snap(scale: Tensor, weight: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round n / s to the norm's dtype, and take s' = n / n' from what was stored.

    x / s' is then exactly what the folded norm computes, up to the fp32 rounding of one product.

    Args:
        scale: f32 `[K]`, positive.
        weight: the stored norm weight `[K]`, in the dtype it will be stored in again.
        offset: what the norm adds to its stored weight before multiplying: 1 in Gemma and Qwen3-Next.
    Returns s' f32 `[K]` and the new stored weight `[K]`. Channels whose folded weight is 0, not finite or off by more
    than a factor of 2 keep s' = 1 and their weight.
    """
    effective = weight.float() + offset
    stored = (effective / scale - offset).to(weight.dtype)
    folded = stored.float() + offset
    snapped = effective / folded
    shift = snapped / scale
    # NaN and infinities fail both comparisons.
    holds = (shift <= LARGEST_SHIFT) & (shift >= 1 / LARGEST_SHIFT)
    return torch.where(holds, snapped, 1.0), torch.where(holds, stored, weight)
