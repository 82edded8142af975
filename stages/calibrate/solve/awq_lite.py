"""AWQ lite: per-input-channel scales s for which Q(W·s)/s loses least, found on a grid of exponents alpha.

Candidates and their formula are modelopt 0.47's (`model_calib.awq_lite`). Its loss, the mean squared error of
the linear's output over all tokens, is tr(ΔW H ΔWᵀ) / (tokens * out_features) here, with H = Σ xxᵀ collected
once: the weight is quantized once per alpha, and no second forward pass is made.

The search runs under the constraints of folding: linears that must share one scale vector are searched
together, as `Member`s; channels that must share one scale are `ties`; a vector that a norm must be able to
hold is snapped before it is judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.calibrate.solve.formats import Format, round_to_nearest
from stages.calibrate.solve.moments import Site, expert_chunks, squared_error

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Member:
    """Linears fed by one site: weights `[E, N, K]`. q/k/v, or an expert's gate and up, are concatenated along
    N: they are then quantized as one fusion group, which shares NVFP4's global scale."""

    weights: Tensor
    site: Site


@dataclass(frozen=True)
class Solution:
    """The weights become Q(W * scale), the input x / scale.

    scale: f32 `[K]`, shared by all members, or `[E, K]`.
    alpha: f32 `[]` or `[E]`, the exponent chosen; NaN where no token was there to judge by and scale is 1.
    losses: f32 `[11]` or `[E, 11]`, the mean squared output error of each alpha.
    """

    scale: Tensor
    alpha: Tensor
    losses: Tensor


def weight_share(weights: Tensor, block_size: int | None) -> Tensor:
    """How large each weight is within its block (0 to 1), averaged over rows: `[E, N, K]` → f32 `[E, K]`."""
    size = block_size or weights.shape[-1]
    # A partial last block is a block of its own: padding it with zeros, as modelopt does, changes no maximum.
    parts = [part.abs() for part in weights.split(size, dim=-1)]
    tiny = torch.finfo(weights.dtype).tiny
    return torch.cat([(part / (part.amax(-1, keepdim=True) + tiny)).mean(-2) for part in parts], -1).float()


def scale_for(alpha: float, activation: Tensor, share: Tensor) -> Tensor:
    """activation^alpha / share^(1 - alpha), centred so that max * min = 1: f32 `[..., K]`."""
    scale = (activation.pow(alpha) / (share.pow(1 - alpha) + TINY)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()


def tie(values: Tensor, ties: Tensor | None) -> Tensor:
    """Give channels with equal `ties` their mean: f32 `[..., K]`, int64 `[K]` → f32 `[..., K]`."""
    if ties is None:
        return values
    count = torch.bincount(ties).to(values)
    sums = values.new_zeros(*values.shape[:-1], len(count)).index_add_(-1, ties, values)
    return (sums / count)[..., ties]


def search(
    members: Sequence[Member],
    format: Format,
    ties: Tensor | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """One scale vector for all members together: what folds into a norm.

    Args:
        members: everything that reads the norm's output through a quantized weight; K is the same for all.
        ties: int64 `[K]`; channels with the same number share a scale (v folded into o: the channels of the
            query heads that read one KV head).
        snap: makes a scale vector exactly foldable.
    """
    tokens = torch.stack([member.site.tokens.sum() for member in members])
    rows = torch.tensor([member.weights.shape[1] for member in members], device=tokens.device)
    abs_sum = torch.stack([member.site.abs_sum.sum(0) for member in members]).sum(0)
    activation = abs_sum / tokens.sum().clamp(min=1)
    # The mean over all rows of all members, as if they were one weight.
    shares = [weight_share(member.weights, format.block_size) for member in members]
    every = torch.cat(shares)
    of_row = torch.cat([count.expand(len(share)) for count, share in zip(rows, shares, strict=True)])
    share = (every * of_row[:, None]).sum(0) / of_row.sum()
    scales = torch.stack([scale_for(alpha, tie(activation, ties), tie(share, ties)) for alpha in ALPHAS])
    if snap is not None:
        scales = torch.stack([snap(scale) for scale in scales])
    totals = torch.stack([sum_errors(members, scale, format) for scale in scales])
    losses = totals / (tokens * rows).sum().clamp(min=1)
    return choose(losses[None], scales[None], tokens.sum()[None], squeeze=True)


def search_each(member: Member, format: Format) -> Solution:
    """One scale vector per expert: what folds into the expert's own up projection."""
    share = weight_share(member.weights, format.block_size)
    scales = torch.stack([scale_for(alpha, member.site.abs_mean, share) for alpha in ALPHAS], dim=1)
    outputs = member.site.tokens.clamp(min=1) * member.weights.shape[1]
    losses = torch.stack([errors(member, scales[:, i], format) / outputs for i in range(len(ALPHAS))], dim=1)
    return choose(losses, scales, member.site.tokens, squeeze=False)


def sum_errors(members: Sequence[Member], scale: Tensor, format: Format) -> Tensor:
    """The error of all members under one scale `[K]`: f32 `[]`."""
    return torch.cat(
        [errors(member, scale.expand(len(member.weights), -1), format) for member in members]
    ).sum()


def errors(member: Member, scale: Tensor, format: Format) -> Tensor:
    """Σ ‖(Q(W s)/s - W) x‖² over the site's tokens: scale `[E, K]` → f32 `[E]`."""
    parts = []
    for part in expert_chunks(len(scale), member.weights[0].numel()):
        weights, s = member.weights[part].float(), scale[part, None]
        difference = round_to_nearest(format, weights * s).dequantize().div_(s).sub_(weights)
        parts.append(squared_error(difference, member.site.second_moment[part]))
    return torch.cat(parts)


def choose(losses: Tensor, scales: Tensor, tokens: Tensor, squeeze: bool) -> Solution:
    """The first alpha of least loss: losses `[E, 11]`, scales `[E, 11, K]`, tokens `[E]`."""
    best = losses.argmin(1)
    scale = scales.gather(1, best[:, None, None].expand(-1, 1, scales.shape[-1]))[:, 0]
    alpha = torch.tensor(ALPHAS, device=losses.device)[best]
    judged = tokens > 0
    scale = torch.where(judged[:, None], scale, 1.0)
    alpha = torch.where(judged, alpha, torch.nan)
    return Solution(scale[0], alpha[0], losses[0]) if squeeze else Solution(scale, alpha, losses)
