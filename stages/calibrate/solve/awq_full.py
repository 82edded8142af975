"""AWQ full: the scales of AWQ lite, then a clip search over the weights they scale."""

from torch import Tensor

from stages.calibrate.solve import awq_clip
from stages.calibrate.solve.formats import Format


def scaled_second_moment(second_moment: Tensor, scale: Tensor) -> Tensor:
    """H of the inputs x / s: H_ij / (s_i s_j), from f32 `[E, K, K]` and `[E, K]` or `[K]`."""
    return second_moment / (scale[..., :, None] * scale[..., None, :])


def clip_scaled(
    format: Format, weights: Tensor, second_moment: Tensor, scale: Tensor, per_block: bool = True
) -> awq_clip.Solution:
    """The clip search after AWQ lite has chosen its scales.

    Args:
        weights: `[E, N, K]`, with everything folded into their rows that will be (up for down, v for o), and
            not yet multiplied by `scale`.
        second_moment: f32 `[E, K, K]` of the unscaled inputs.
        scale: f32 `[E, K]` or `[K]`, from `awq_lite`.
        per_block: one ratio per block scale; False: modelopt's choice for NVFP4, one per matrix.
    """
    scaled = weights.float() * scale[..., None, :]
    moments = scaled_second_moment(second_moment, scale)
    search = awq_clip.search_block if per_block else awq_clip.search_tensor
    return search(format, scaled, moments)
