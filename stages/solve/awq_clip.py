"""AWQ clip: scales for a smaller amax than the weights' own, where that loses less at the output.

Ratios are modelopt 0.47's (`model_calib.awq_clip`), 0.5 to 1 in steps of 0.05. Two grains:

    tensor   one ratio per matrix, judged by tr(ΔW H ΔWᵀ). modelopt's choice for NVFP4, whose global scale it
             moves.
    block    one ratio per stored block scale, judged by that block's own contribution, Δ_b H_bb Δ_bᵀ.
             modelopt's choice for INT4; for NVFP4 it keeps the global scale and moves the e4m3 scale of each
             block.

For block grain modelopt looks at no more than 64 tokens of each batch; H holds all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.formats.quantized import constants, quantize, round_to_nearest
from stages.formats.weight_format import tensor_amax
from stages.solve.moments import block_errors, chunks, diagonal_blocks, squared_error, to_judge_by

RATIOS = tuple(round(0.5 + 0.05 * i, 2) for i in range(11))


@dataclass(frozen=True)
class Clipping:
    """amax: f32 `[E, 1, 1]` or, per block, `[E, N, blocks]`, the clipped amax.
    losses: f32 `[E]` or `[E, N, blocks]`, the squared output error under it, summed over tokens.
    """

    amax: Tensor
    losses: Tensor


def search_tensor(format: WeightFormat, weights: Tensor, second_moment: Tensor) -> Clipping:
    """One ratio per matrix, the smallest of equal ones: weights `[E, N, K]`, second_moment `[E, K, K]`."""
    return in_chunks(tensor_ratios, format, weights, second_moment)


def search_block(format: WeightFormat, weights: Tensor, second_moment: Tensor) -> Clipping:
    """One ratio per block scale, the smallest of equal ones; shapes as in `search_tensor`.

    Raises ValueError for formats that have no block scales.
    """
    if format.grain == "tensor":
        raise ValueError(
            f"{format.name} has one scale per tensor and no block scale to clip; search_tensor clips it"
        )
    return in_chunks(block_ratios, format, weights, second_moment)


def in_chunks(
    search: Callable[[WeightFormat, Tensor, Tensor], Clipping],
    format: WeightFormat,
    weights: Tensor,
    moment: Tensor,
) -> Clipping:
    experts = chunks(len(weights), weights[0].numel())
    parts = [search(format, weights[part], moment[part]) for part in experts]
    return Clipping(torch.cat([part.amax for part in parts]), torch.cat([part.losses for part in parts]))


def tensor_ratios(format: WeightFormat, weights: Tensor, second_moment: Tensor) -> Clipping:
    weights = weights.float()
    own = tensor_amax(weights)
    differences = (
        round_to_nearest(format, weights, own * ratio).dequantize().sub_(weights) for ratio in RATIOS
    )
    moment = to_judge_by(second_moment)
    losses = torch.stack([squared_error(difference, moment) for difference in differences])
    least, best = losses.min(0)
    return Clipping(own * constants(RATIOS, own.device)[best][:, None, None], least)


def block_ratios(format: WeightFormat, weights: Tensor, second_moment: Tensor) -> Clipping:
    within = diagonal_blocks(second_moment, format.block_size or weights.shape[-1])
    shared = format.search_scale(weights)
    if weights.is_cuda:
        found = format.clip_on_gpu(weights, within, shared, constants(RATIOS, weights.device))
        if found is not None:
            return Clipping(*found)
    weights = weights.float()
    own = format.block_amax(weights)
    amax, least = own, torch.full_like(own, torch.inf)
    for ratio in RATIOS:
        scale = format.scales_from_amax(own * ratio, shared)
        difference = quantize(format, weights, scale, shared).dequantize().sub_(weights)
        loss = block_errors(format.blocks(difference), within)
        better = loss < least
        least = torch.where(better, loss, least)
        amax = torch.where(better, own * ratio, amax)
    return Clipping(amax, least)
