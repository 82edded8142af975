"""AWQ lite: per-input-channel scales s for which Q(W·s)/s loses least, found on a grid of exponents alpha.

Candidates and their formula are modelopt 0.47's (`model_calib.awq_lite`). Its loss, the mean squared error of
the linear's output over all tokens, is tr(ΔW H ΔWᵀ) / (tokens * out_features) here, with H = Σ xxᵀ collected
once: the weight is quantized once per alpha, and no second forward pass is made.

The search runs under the constraints of folding: linears that must share one scale vector are searched
together, as `Member`s; channels that must share one scale are a row of `ties`; a vector that a norm must be
able to hold is snapped before it is judged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.formats.quantized import constants, round_to_nearest
from stages.solve.moments import CHUNK_ELEMENTS, SiteStatistics, chunks, squared_error, to_judge_by

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Member:
    """Linears fed by one site: weights `[E, N, K]`. q/k/v, or an expert's gate and up, are concatenated along
    N: they are then quantized as one fusion group, which shares NVFP4's global scale."""

    weights: Tensor
    site: SiteStatistics

    @cached_property
    def largest(self) -> Tensor:
        """max|W| per input channel: f32 `[E, K]`."""
        return self.weights.abs().amax(1).float()


@dataclass(frozen=True)
class FoundScale:
    """The weights become Q(W * scale), the input x / scale.

    scale: f32 `[K]`, shared by all members, or `[E, K]`.
    alpha: f32 `[]` or `[E]`, the exponent chosen; NaN where no token was there to judge by and scale is 1.
    losses: f32 `[11]` or `[E, 11]`, the mean squared output error of each alpha.
    """

    scale: Tensor
    alpha: Tensor
    losses: Tensor


def weight_share(weights: Tensor, block_size: int) -> Tensor:
    """How large each weight is within its block (0 to 1), averaged over rows: `[E, N, K]` → f32 `[E, K]`."""
    columns = weights.shape[-1]
    size = block_size or columns
    # A partial last block is a block of its own: padding it with zeros, as modelopt does, changes no maximum.
    full = columns // size * size
    tiny = torch.finfo(weights.dtype).tiny
    shares = []
    for part, width in ((weights[..., :full], size), (weights[..., full:], columns - full)):
        if part.shape[-1]:
            blocks = part.abs().unflatten(-1, (-1, width))
            shares.append((blocks / (blocks.amax(-1, keepdim=True) + tiny)).flatten(-2).mean(-2))
    return torch.cat(shares, -1).float()


def scale_for(alpha: Tensor, activation: Tensor, share: Tensor) -> Tensor:
    """activation^alpha / share^(1 - alpha), centred so that max * min = 1: f32 `[..., K]`; alpha f32
    `[..., 1]`.
    """
    scale = (activation.pow(alpha) / (share.pow(1 - alpha) + TINY)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()


def tie(values: Tensor, ties: Tensor | None) -> Tensor:
    """Give channels that share a scale their mean: f32 `[..., K]`; ties int64 `[K/R, R]`, a row the channels
    that belong together.
    """
    if ties is None:
        return values
    tied = torch.empty_like(values)
    tied[..., ties] = values[..., ties].mean(-1, keepdim=True).expand(*values.shape[:-1], *ties.shape)
    return tied


def search(
    members: Sequence[Member],
    format: WeightFormat,
    ties: Tensor | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
) -> FoundScale:
    """One scale vector for all members together: what folds into a norm.

    Args:
        members: everything that reads the norm's output through a quantized weight; K is the same for all.
        ties: int64 `[K/R, R]`; the channels of a row share a scale (v folded into o: the channels of the
            query heads that read one KV head).
        snap: makes scale vectors `[11, K]` exactly foldable.
    """
    tokens = torch.stack([member.site.tokens.sum() for member in members])
    activation = torch.stack([member.site.abs_sum.sum(0) for member in members]).sum(0)
    activation = activation / tokens.sum().clamp(min=1)
    # The mean over all rows of all members, as if they were one weight.
    rows = [member.weights.shape[1] for member in members]
    shares = [weight_share(member.weights, format.block_size).sum(0) for member in members]
    share = torch.stack([count * part for count, part in zip(rows, shares, strict=True)]).sum(0)
    share = share / sum(count * len(member.weights) for count, member in zip(rows, members, strict=True))
    alphas = constants(ALPHAS, share.device)[:, None]
    scales = scale_for(alphas, tie(activation, ties), tie(share, ties))
    if snap is not None:
        scales = snap(scales)
    every = [
        errors(member, scales[:, None].expand(-1, len(member.weights), -1), format) for member in members
    ]
    outputs = torch.stack([seen * count for seen, count in zip(tokens, rows, strict=True)]).sum()
    losses = torch.cat(every, dim=1).sum(1) / outputs.clamp(min=1)
    return choose(losses[None], scales[None], tokens.sum()[None], squeeze=True)


def search_each(member: Member, format: WeightFormat) -> FoundScale:
    """One scale vector per expert: what folds into the expert's own up projection."""
    share = weight_share(member.weights, format.block_size)
    alphas = constants(ALPHAS, share.device)[:, None, None]
    scales = scale_for(alphas, member.site.abs_mean, share)
    outputs = member.site.tokens.clamp(min=1) * member.weights.shape[1]
    losses = errors(member, scales, format) / outputs
    return choose(losses.mT, scales.transpose(0, 1), member.site.tokens, squeeze=False)


def errors(member: Member, scales: Tensor, format: WeightFormat) -> Tensor:
    """Σ ‖(Q(W s)/s - W) x‖² over the site's tokens: scales `[A, E, K]` → f32 `[A, E]`."""
    amax = (member.largest * scales).amax(-1)[..., None, None]  # of W s, exactly: rounding is monotonic
    parts = []
    for part in chunks(len(member.weights), member.weights[0].numel()):
        weights, moment = member.weights[part], to_judge_by(member.site.second_moment[part])
        found = [
            squared_error(scaled_difference(format, weights, scales[some, part], amax[some, part]), moment)
            for some in _together(len(scales), weights)
        ]
        parts.append(torch.cat(found))
    return torch.cat(parts, dim=1)


def _together(candidates: int, weights: Tensor) -> Iterator[slice]:
    """The candidates to judge at once: one on a CPU, as many as there is memory for on a GPU."""
    return chunks(candidates, weights.numel() if weights.is_cuda else CHUNK_ELEMENTS)


def scaled_difference(format: WeightFormat, weights: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
    """Q(W s)/s - W: weights `[E, N, K]`, scales `[A, E, K]`, amax max|W s| `[A, E, 1, 1]` → `[A, E, N, K]`,
    bf16 where a kernel does it, else f32.
    """
    if weights.is_cuda:
        found = format.error_on_gpu(weights, scales, format.search_scale(weights, amax))
        if found is not None:
            return found
    weights, s = weights.float(), scales[:, :, None]
    return round_to_nearest(format, weights * s, amax).dequantize().div_(s).sub_(weights)


def choose(losses: Tensor, scales: Tensor, tokens: Tensor, squeeze: bool) -> FoundScale:
    """The first alpha of least loss: losses `[E, 11]`, scales `[E, 11, K]`, tokens `[E]`."""
    best = losses.argmin(1)
    scale = scales.gather(1, best[:, None, None].expand(-1, 1, scales.shape[-1]))[:, 0]
    alpha = constants(ALPHAS, losses.device)[best]
    judged = tokens > 0
    scale = scale.masked_fill(~judged[:, None], 1.0)
    alpha = alpha.masked_fill(~judged, torch.nan)
    return FoundScale(scale[0], alpha[0], losses[0]) if squeeze else FoundScale(scale, alpha, losses)
