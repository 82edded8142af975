"""Block scales searched alone, weights then rounded to nearest: modelopt's `local_hessian`.

Every scale that the format can store for a block is tried (126 e4m3 values for NVFP4), and judged by what the
block alone adds to the output's squared error, Δ_b H_bb Δ_bᵀ with H_bb the block's own part of H = Σ xxᵀ
(modelopt 0.47's `model_calib.local_hessian_calibrate` with `fp8_scale_sweep`). The scale of the whole tensor
comes from max|W|, as without a search.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.formats.quantized import quantize
from stages.solve.moments import block_errors, chunks, diagonal_blocks


@dataclass(frozen=True)
class BlockScales:
    """amax: f32 `[E, N, blocks]`, from which the format makes the scales that were found.
    losses: f32 `[E, N, blocks]`, the squared error each block adds under them, summed over tokens.
    """

    amax: Tensor
    losses: Tensor


def search(
    format: WeightFormat, weights: Tensor, second_moment: Tensor, amax: Tensor | None = None
) -> BlockScales:
    """The scale of least loss for each block, the smallest of equal ones.

    Args:
        weights: `[E, N, K]`; a fusion group's linears concatenated along N.
        second_moment: f32 `[E, K, K]`; see `moments.with_prior` for experts with few tokens. Blocks of
            channels that were always zero are judged by the plain error of their weights.
        amax: f32 `[E, 1, 1]`, what the tensor's scale comes from, instead of max|weights|.
    Raises ValueError for formats whose block scales are too many to try.
    """
    scales = format.every_scale()
    if scales is None:
        raise ValueError(f"{format.name} has no block scales that could be tried one by one")
    scales = scales.to(weights.device)
    parts = [
        search_chunk(format, weights[part], second_moment[part], scales, None if amax is None else amax[part])
        for part in chunks(len(weights), weights[0].numel())
    ]
    return BlockScales(torch.cat([part.amax for part in parts]), torch.cat([part.losses for part in parts]))


def search_chunk(
    format: WeightFormat, weights: Tensor, second_moment: Tensor, scales: Tensor, amax: Tensor | None
) -> BlockScales:
    """`search` for as many experts as memory allows: scales f32 `[S]`."""
    within = taught(diagonal_blocks(second_moment, format.block_size))
    shared = format.search_scale(weights, amax)
    found = format.sweep_on_gpu(weights, within, shared, scales) if weights.is_cuda else None
    best, least = found or sweep(format, weights.float(), within, shared, scales)
    return BlockScales(best * format.bound if shared is None else best * (format.bound * shared), least)


def taught(within: Tensor) -> Tensor:
    """H's blocks, the identity for those that are zero: all scales would be equal there, and the smallest
    clips everything.
    """
    power = within.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(within.shape[-1], dtype=within.dtype, device=within.device)
    return torch.where(power > 0, within, identity)


def sweep(
    format: WeightFormat, weights: Tensor, within: Tensor, shared: Tensor | None, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Try one scale after another: the best and its loss, f32 `[E, N, blocks]` both."""
    blocks = format.blocks(weights)
    best = torch.ones(blocks.shape[:-1], device=weights.device)
    least = torch.full_like(best, torch.inf)
    for scale in scales:
        difference = quantize(format, weights, scale.view(1, 1, 1), shared).dequantize().sub_(weights)
        loss = block_errors(format.blocks(difference), within)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, scale, best)
    return best, least
