"""What NVFP4 rounding changes, and where to clip it: the same bits as torch."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import NVFP4
from stages.formats.quantized import quantize
from stages.kernels import nvfp4_clip, nvfp4_error
from stages.solve import awq_clip, scale_search
from stages.solve.moments import diagonal_blocks

EXACT = {"rtol": 0, "atol": 0}


def heavy_tailed() -> torch.Tensor:
    weights = torch.randn(3, 20, 176, generator=torch.Generator().manual_seed(0)) ** 3
    weights[0, 0, :16] = 0
    return weights.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_difference(device: str, dtype: torch.dtype) -> None:
    weights = heavy_tailed()
    scales = torch.rand(2, 3, 176, generator=torch.Generator().manual_seed(1)) * 4 + 0.1
    scaled = weights.float() * scales[:, :, None]
    shared = NVFP4.search_scale(scaled)
    expected = quantize(
        NVFP4,
        scaled,
        NVFP4.scales_from_amax(NVFP4.block_amax(scaled), shared),
        shared,
    )
    difference = nvfp4_error.scaled_difference(
        weights.to(device), scales.to(device), shared.flatten(1).to(device), dtype
    )
    changed = expected.dequantize() / scales[:, :, None] - weights.float()
    assert_close(difference.cpu(), changed.to(dtype), **EXACT)


def test_clip_blocks(device: str) -> None:
    weights = heavy_tailed()
    inputs = torch.randn(3, 400, 176, generator=torch.Generator().manual_seed(2))
    moment = inputs.mT @ inputs
    expected = awq_clip.search_block(NVFP4, weights, moment)
    within = torch.stack([moment[:, i : i + 16, i : i + 16] for i in range(0, 176, 16)], dim=1)
    amax, losses = nvfp4_clip.clip_blocks(
        weights.to(device),
        within.to(device),
        NVFP4.search_scale(weights).flatten().to(device),
        torch.tensor(awq_clip.RATIOS, device=device),
    )
    assert_close(losses.cpu(), expected.losses, rtol=1e-4, atol=1e-4)
    # Two ratios may lose the same but for rounding.
    assert (amax.cpu() == expected.amax).float().mean() > 0.999


def test_sweep_blocks(device: str) -> None:
    weights = heavy_tailed()[:1, :20, :48].contiguous()
    weights[0, 0] = 0
    inputs = torch.randn(1, 400, 48, generator=torch.Generator().manual_seed(2))
    within = diagonal_blocks(inputs.mT @ inputs, 16)
    shared, scales = NVFP4.search_scale(weights), NVFP4.every_scale()
    assert shared is not None and scales is not None
    expected = scale_search.sweep(NVFP4, weights.float(), within, shared, scales)
    best, losses = nvfp4_clip.sweep_blocks(
        weights.to(device), within.to(device), shared.flatten().to(device), scales.to(device)
    )
    assert_close(losses.cpu(), expected[1], rtol=1e-4, atol=1e-4)
    assert (best.cpu() == expected[0]).float().mean() > 0.98
    assert (best[0, 0] == 2**-9).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="modelopt's kernel needs a GPU")
def test_scales_are_those_of_modelopts_sweep(device: str) -> None:
    from modelopt.torch.kernels.quantization.gemm import nvfp4_fp8_scale_sweep_hessian

    weights = heavy_tailed()[:1].to(device)
    inputs = torch.randn(1, 400, weights.shape[-1], generator=torch.Generator().manual_seed(2)).to(device)
    moment = inputs.mT @ inputs
    found = scale_search.search(NVFP4, weights, moment).amax[0]
    theirs = nvfp4_fp8_scale_sweep_hessian(
        weights[0].reshape(-1, 16), weights.abs().amax().float(), diagonal_blocks(moment, 16)[0] / 400
    ).view_as(found)
    shared = NVFP4.search_scale(weights)[0]
    ours, others = (NVFP4.scales_from_amax(amax, shared).float() for amax in (found, theirs))
    assert (ours == others).float().mean() > 0.999
