"""GPTQ: quantize column by column, each column's error compensated in the columns not yet quantized.

Frantar et al. 2022 (arXiv 2210.17323), from H = Σ xxᵀ, batched over experts. Two additions, neither of which
changes the format:

* A block's scale is chosen when its turn comes, from the compensated weights: every candidate is carried
  through the block's own columns, and the one with the least compensated error Σ err² stays.
* Blocks are visited in order of their power, and the columns within a block too (the paper's act-order, with
  whole blocks moving), so that what matters most is compensated by the most columns. The result keeps the
  original order.

The global scale is fixed beforehand, so that the linears of a fusion group can share it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.formats.quantized import Quantized, step
from stages.solve.moments import chunks

DAMPING = 0.01
# Columns quantized between two updates of all that follow, where the format sets one scale for a whole row.
PANEL = 16
# Weights of one block, times the scales that are tried for it, worked on at a time.
BLOCK_ELEMENTS = 2**26
# How far beyond the grid a latent may lie, in units of the grid: all of it is rounded to the grid's end.
BEYOND = 0.5


def solve(
    weights: Tensor,
    second_moment: Tensor,
    format: WeightFormat,
    amax: Tensor | None = None,
    damping: float = DAMPING,
) -> Quantized:
    """Quantize so that tr(ΔW H ΔWᵀ) is small.

    Args:
        weights: `[E, N, K]`; a fusion group's linears concatenated along N.
        second_moment: f32 `[E, K, K]`; see `moments.with_prior` for experts with few tokens.
        amax: f32 `[E, 1, 1]` for NVFP4's global scale or FP8's scale, instead of max|weights|.
        damping: added to H's diagonal, relative to its mean.
    Raises ValueError where the format's blocks do not divide K.
    """
    return Quantized.concatenate(
        [quantized for quantized, _ in solve_chunks(weights, second_moment, format, amax, damping)]
    )


def solve_latent(
    weights: Tensor,
    second_moment: Tensor,
    format: WeightFormat,
    amax: Tensor | None = None,
    damping: float = DAMPING,
) -> tuple[Quantized, Tensor]:
    """`solve`, and what it rounded: where gradient steps on the rounding begin.

    The latents are the compensated columns in units of the step that was chosen for them, in the order of the
    weights: f32 `[E, N, K]`, no further than BEYOND off the grid (±6.5 for NVFP4). Rounded to the grid they
    are the values, bit for bit.
    """
    parts = list(solve_chunks(weights, second_moment, format, amax, damping))
    bound = format.bound + BEYOND
    latents = torch.cat([latents for _, latents in parts]).clamp_(-bound, bound)
    return Quantized.concatenate([quantized for quantized, _ in parts]), latents


def solve_chunks(
    weights: Tensor, second_moment: Tensor, format: WeightFormat, amax: Tensor | None, damping: float
) -> Iterator[tuple[Quantized, Tensor]]:
    """As many experts at a time as memory allows: quantized, and unbounded latents as in `solve_latent`."""
    format.blocks(weights)
    for part in chunks(len(weights), weights[0].numel() + second_moment[0].numel()):
        own = None if amax is None else amax[part]
        yield solve_chunk(weights[part].float(), second_moment[part], format, own, damping)


def solve_chunk(
    weights: Tensor, second_moment: Tensor, format: WeightFormat, amax: Tensor | None, damping: float
) -> tuple[Quantized, Tensor]:
    """`solve_chunks` for the experts of one chunk."""
    block = format.block_size or PANEL
    order = column_order(second_moment.diagonal(dim1=1, dim2=2), block)
    ordered = take_columns(take_columns(second_moment, order).mT, order)
    factor = inverse_factor(ordered, damping)
    shared = format.search_scale(weights, amax)
    fixed = None if format.block_size else row_scales(format, weights, amax)

    weights = take_columns(weights, order)
    # Rows do not depend on each other: all experts at once, as many rows as memory allows.
    tried = format.candidates_count if format.block_size else 1
    rows = max(1, BLOCK_ELEMENTS // (len(weights) * block * tried))
    parts = [
        compensate(
            part, factor, format, shared, None if fixed is None else fixed[:, i * rows : (i + 1) * rows]
        )
        for i, part in enumerate(weights.split(rows, dim=1))
    ]
    latents, scale = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))

    back = order.argsort(dim=-1)
    latents = take_columns(latents, back)
    if fixed is None:
        scale = take_columns(scale, back[:, ::block] // block)
        scale = scale.to(format.scale_dtype)
    else:
        scale = fixed[:, :1] if format.grain == "tensor" else fixed
    return Quantized(format, format.round(latents), scale, shared), latents


def column_order(power: Tensor, block: int) -> Tensor:
    """The order to visit columns in: int64 `[E, K]`; power f32 `[E, K]` is H's diagonal.

    Blocks stay together, the most powerful first; so do columns within a block. A last block that is not full
    (only where the format sets no blocks) stays last.
    """
    full = power.shape[-1] // block * block
    blocks = power[:, :full].unflatten(-1, (-1, block))
    within = blocks.argsort(dim=-1, descending=True, stable=True)
    within += torch.arange(0, full, block, device=power.device)[:, None]
    across = blocks.sum(-1).argsort(dim=-1, descending=True, stable=True)
    order = within.gather(1, across[..., None].expand_as(within)).flatten(1)
    rest = torch.arange(full, power.shape[-1], device=power.device).expand(len(power), -1)
    return torch.cat([order, rest], dim=-1)


def take_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of each `[E, N, K]` by `[E, K]`."""
    return matrix.gather(2, order[:, None].expand(-1, matrix.shape[1], -1))


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of (H + damping * mean(diag H) * I)⁻¹: f32 `[E, K, K]`.

    With J the exchange matrix and J H J = L Lᵀ, it is (J L J)⁻¹: one factorization and one triangular
    inverse, in f64. Damping keeps H positive definite; an input channel that is always 0 then compensates
    nothing, and is not compensated for.
    """
    damped = second_moment.double()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(-1, keepdim=True)
    # An all-zero H: the identity, for which nothing is compensated.
    damped = damped + torch.diag_embed((damping * torch.where(mean > 0, mean, 1.0)).expand_as(diagonal))
    factor = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=True).float()


def row_scales(format: WeightFormat, weights: Tensor, amax: Tensor | None) -> Tensor:
    """Each row's scale in formats without blocks, from the weights as they came: f32 `[E, N, 1]`."""
    own = amax if format.grain == "tensor" and amax is not None else format.block_amax(weights)
    return format.scales_from_amax(own, None).expand(*weights.shape[:2], 1)


def compensate(
    weights: Tensor, factor: Tensor, format: WeightFormat, shared: Tensor | None, fixed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Go through the columns in order: weights `[E, N, K]`, factor `[E, K, K]`.

    Args:
        fixed: f32 `[E, N, 1]`, the rows' scales where the format sets no blocks.
    Returns latents (each column as it was when it was rounded, in units of its step) f32 `[E, N, K]`, and the
    scales used f32 `[E, N, K / block]`.
    """
    work = weights.mT.contiguous()  # a column's rows lie side by side
    scales = []
    columns, block = work.shape[1], format.block_size or PANEL
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        parts = work[:, start:stop], factor[:, start:stop, start:stop]
        solved = None
        if weights.is_cuda and stop - start == block:
            solved = format.gptq_on_gpu(*parts, shared, fixed)
        latents, errors, scale = solved or solve_block(*parts, format, shared, fixed)
        scales.append(scale)
        if stop < columns:
            work[:, stop:].baddbmm_(factor[:, start:stop, stop:].mT, errors, alpha=-1)
        work[:, start:stop] = latents  # nothing reads these columns any more
    return work.mT, torch.stack(scales, dim=-1)


def solve_block(
    columns: Tensor, factor: Tensor, format: WeightFormat, shared: Tensor | None, fixed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each row's scale of a block, and quantize under it.

    Args:
        columns: f32 `[E, B, N]`; factor: f32 `[E, B, B]`; shared, fixed: as in `compensate`.
    Returns latents and errors as `quantize_block` does, and the scales chosen, f32 `[E, N]`.
    """
    tried = fixed[None, ..., 0] if fixed is not None else format.candidates(columns.abs().amax(1), shared)
    steps = step(tried, None if shared is None else shared[..., 0])
    latents, errors, best = quantize_block(columns, factor, steps, format)
    return latents, errors, tried.gather(0, best[None])[0]


def quantize_block(
    columns: Tensor, factor: Tensor, steps: Tensor, format: WeightFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a block's columns one after another under each candidate step; keep each row's best.

    Args:
        columns: f32 `[E, B, N]`; factor: f32 `[E, B, B]`; steps: f32 `[C, E, N]`.
    Returns what was rounded, in units of its step, f32 `[E, B, N]`; errors (w - q) / factor_jj, likewise; the
    candidates chosen, int64 `[E, N]`.
    """
    work = columns.expand(len(steps), *columns.shape).clone()
    latents = torch.empty_like(work)
    total = torch.zeros_like(steps)
    for j in range(columns.shape[1]):
        column, latent = work[:, :, j], latents[:, :, j]
        torch.div(column, steps, out=latent)
        # The error takes the column's place.
        column.sub_(format.round(latent) * steps).div_(factor[:, j, j, None])
        total.addcmul_(column, column)
        work[:, :, j + 1 :] -= factor[:, j, j + 1 :, None] * column[:, :, None]
    best = total.argmin(0)
    index = best[None, :, None].expand(1, *columns.shape)
    return latents.gather(0, index)[0], work.gather(0, index)[0], best
