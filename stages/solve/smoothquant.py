"""SmoothQuant: per-input-channel scales that move outliers from INT8 activations into the weights.

modelopt 0.47's formula (`model_calib.smoothquant`, alpha 1 by default: the weights then play no part). Needs
only the channel amax of a max-calibrated run, so that it is computed at export.
"""

import torch
from torch import Tensor

EPSILON = 1.0 / (1 << 31)


def pre_quant_scale(activation_amax: Tensor, weights: Tensor, alpha: float = 1.0) -> Tensor:
    """What the input is multiplied with, and the weights' columns are divided by.

    Args:
        activation_amax: f32 `[..., K]`, the largest |x| of each input channel.
        weights: `[..., N, K]`; linears that share the input are concatenated along N.
        alpha: 0 to 1, how much of the difficulty moves into the weights.
    Returns f32 `[..., K]` in 1e-4 .. 1e4; channels that never saw a value other than 0 keep 1.
    """
    amax = activation_amax.float()
    # The weights' power is taken in their own dtype, as modelopt takes it.
    scale = weights.abs().amax(-2).pow(1 - alpha).float() / amax.pow(alpha)
    # modelopt masks dead channels only where some scale came out that small; an infinite one is clamped to
    # 1e4.
    some_vanish = scale.amin(-1, keepdim=True) <= EPSILON
    return torch.where(some_vanish & (amax <= EPSILON), 1.0, scale).clamp(1e-4, 1e4)
