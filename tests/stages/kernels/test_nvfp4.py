"""What NVFP4 rounding changes, and where to clip it: the same bits as torch."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import NVFP4
from stages.formats.quantized import quantize
from stages.kernels import nvfp4_clip, nvfp4_error
from stages.solve import awq_clip

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
