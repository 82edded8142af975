"""GPTQ within one block of columns: every candidate scale tried in registers, the best one written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.kernels.rounding import (
    FP8,
    INT4,
    INT8,
    NVFP4,
    decode_e4m3,
    encode_e4m3,
    nvfp4_scale,
    round_to,
)

GRIDS = {"nvfp4": NVFP4, "int4": INT4, "int8": INT8, "fp8": FP8}
ELEMENTS = 8192  # of one tile


def solve_block(
    columns: Tensor, factor: Tensor, grid: str, base: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq.solve_block`, for a block of 2^n columns.

    Args:
        columns: f32 [E, B, N], rows side by side. factor: f32 [E, B, B], in any order of memory.
        grid: a key of GRIDS.
        base: f32; NVFP4's tensor scale [E]; INT8's and FP8's scale of each row [E, N]; not read for INT4.
        candidates: NVFP4's offsets of e4m3 codes, int32; INT4's ratios, f32; one of any value for the others.
    Returns latents, errors (f32 [E, B, N]) and scales (f32 [E, N]).
    """
    experts, block, rows = columns.shape
    latents = torch.empty(columns.shape, device=columns.device)
    errors, scales = torch.empty_like(latents), torch.empty(experts, rows, device=columns.device)
    tile = max(16, ELEMENTS // block)
    _solve[(triton.cdiv(rows, tile), experts)](
        columns,
        factor,
        base,
        candidates,
        latents,
        errors,
        scales,
        rows,
        *columns.stride()[:2],
        *factor.stride(),
        len(candidates),
        GRIDS[grid],
        block,
        tile,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return latents, errors, scales


def solve_fixed(columns: Tensor, factor: Tensor, grid: str, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`solve_block` where each row's scale is given: f32 [E, N, 1]."""
    one = torch.ones(1, device=columns.device)
    return solve_block(columns, factor, grid, scales[..., 0].contiguous(), one)


@triton.jit
def _solve(
    columns, factor, base, candidates, latents, errors, scales, rows,
    columns_expert, columns_lane, factor_expert, factor_row, factor_lane, count,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, BLOCK)
    origin = columns + expert * columns_expert
    original = tl.load(origin + lane[:, None] * columns_lane + row[None, :], mask=inside[None, :], other=0.0)
    own_factor = factor + expert * factor_expert
    amax = tl.max(tl.abs(original), 0)
    common = 1.0
    if FORMAT == NVFP4:
        common = tl.load(base + expert)
        code = encode_e4m3(nvfp4_scale(amax, common))
    least = tl.full([ROWS], float("inf"), tl.float32)
    kept_scale = tl.zeros([ROWS], tl.float32)
    kept_latents = tl.zeros([BLOCK, ROWS], tl.float32)
    kept_errors = tl.zeros([BLOCK, ROWS], tl.float32)
    for candidate in range(count):
        if FORMAT == NVFP4:
            # Neighbouring positive e4m3 values are neighbouring codes; 127 is NaN, 0 is zero.
            scale = decode_e4m3(tl.minimum(tl.maximum(code + tl.load(candidates + candidate), 1), 126))
        elif FORMAT == INT4:
            clipped = amax * tl.load(candidates + candidate)
            scale = tl.where(clipped > 0, tl.div_rn(clipped, 7.0), 1.0)
        else:
            scale = tl.load(base + expert * rows + row, mask=inside, other=1.0)
        step = scale * common
        work = original
        scaled = tl.zeros([BLOCK, ROWS], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for j in range(BLOCK):
            current = (lane == j)[:, None]
            column = tl.sum(tl.where(current, work, 0.0), 0)
            latent = tl.div_rn(column, step)
            spread = own_factor + j * factor_row
            error = tl.div_rn(column - round_to(latent, FORMAT) * step, tl.load(spread + j * factor_lane))
            total += error * error
            scaled = tl.where(current, latent[None, :], scaled)
            after = work - tl.load(spread + lane * factor_lane)[:, None] * error[None, :]
            # The error takes the column's place.
            work = tl.where((lane > j)[:, None], after, tl.where(current, error[None, :], work))
        better = total < least
        least = tl.where(better, total, least)
        kept_scale = tl.where(better, scale, kept_scale)
        kept_latents = tl.where(better[None, :], scaled, kept_latents)
        kept_errors = tl.where(better[None, :], work, kept_errors)
    place = (expert * BLOCK + lane)[:, None] * rows + row[None, :]
    tl.store(latents + place, kept_latents, mask=inside[None, :])
    tl.store(errors + place, kept_errors, mask=inside[None, :])
    tl.store(scales + expert * rows + row, kept_scale, mask=inside)
