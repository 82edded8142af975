"""Clip searches, per tensor and per block, and AWQ full."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, WeightFormat
from stages.formats.quantized import Quantized, quantize, round_to_nearest
from stages.solve import awq_clip, moments
from stages.solve.moments import squared_error

EXACT = {"rtol": 0, "atol": 0}


def problem(columns: int = 256):
    """Heavy-tailed weights, so that clipping pays."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 8, columns, generator=generator) ** 3
    inputs = torch.randn(2, 512, columns, generator=generator)
    return weights, inputs.mT @ inputs


def clipped(format: WeightFormat, weights: torch.Tensor, amax: torch.Tensor) -> Quantized:
    """The weights under what a search per block found."""
    shared = format.search_scale(weights)
    return quantize(format, weights, format.scales_from_amax(amax, shared), shared)


def test_ratios():
    assert awq_clip.RATIOS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def test_tensor_takes_the_ratio_of_least_output_error():
    weights, moment = problem()
    solution = awq_clip.search_tensor(FP8, weights, moment)
    own = weights.abs().amax(dim=(1, 2), keepdim=True)
    for expert in range(2):
        losses = [
            squared_error(round_to_nearest(FP8, weights, own * ratio).dequantize() - weights, moment)[expert]
            for ratio in awq_clip.RATIOS
        ]
        best = awq_clip.RATIOS[int(torch.stack(losses).argmin())]
        assert_close(solution.amax[expert], own[expert] * best, **EXACT)
        assert_close(solution.losses[expert], min(losses), **EXACT)


def test_nvfp4_tensor_clip_moves_the_global_scale():
    weights, moment = problem()
    solution = awq_clip.search_tensor(NVFP4, weights, moment)
    clipped = round_to_nearest(NVFP4, weights, solution.amax)
    error = squared_error(clipped.dequantize() - weights, moment)
    assert_close(solution.losses, error, **EXACT)


def test_nvfp4_block_clip_keeps_the_global_scale():
    weights, moment = problem()
    solution = awq_clip.search_block(NVFP4, weights, moment)
    before = squared_error(round_to_nearest(NVFP4, weights).dequantize() - weights, moment)
    after = squared_error(clipped(NVFP4, weights, solution.amax).dequantize() - weights, moment)
    assert (after < 0.96 * before).all()


def test_a_block_by_hand():
    # int8, one block per row, the second channel dead: clipping 127 to half costs nothing, and 0.3 becomes
    # 0.5.
    weights = torch.tensor([[[0.3, 127.0]]])
    moment = torch.tensor([[[10.0, 0.0], [0.0, 0.0]]])
    solution = awq_clip.search_block(INT8_SQ, weights, moment)
    # Steps 0.5, 0.55, ..., 1.0: 0.3 rounds to one step up to 0.55 (error 0.2 at 0.5), and to none from 0.65
    # on.
    assert_close(solution.amax, torch.tensor([[[63.5]]]), **EXACT)
    assert_close(solution.losses, torch.tensor([[[0.4]]]))
    assert clipped(INT8_SQ, weights, solution.amax).values.tolist() == [[[1.0, 127.0]]]


@pytest.mark.parametrize("format", [NVFP4, INT4_AWQ])
def test_block_losses_add_up_to_the_error_under_a_block_diagonal_moment(format):
    weights, moment = problem()
    size = format.block_size
    mask = torch.block_diag(*[torch.ones(size, size)] * (256 // size))
    solution = awq_clip.search_block(format, weights, moment)
    error = squared_error(clipped(format, weights, solution.amax).dequantize() - weights, moment * mask)
    assert_close(solution.losses.sum(dim=(1, 2)), error)


@pytest.mark.parametrize("search", [awq_clip.search_tensor, awq_clip.search_block])
def test_chunks_of_experts_are_joined(search, monkeypatch):
    weights, moment = problem()
    whole = search(NVFP4, weights, moment)
    monkeypatch.setattr(moments, "CHUNK_ELEMENTS", 1)
    chunked = search(NVFP4, weights, moment)
    assert_close(chunked.amax, whole.amax, **EXACT)
    assert_close(chunked.losses, whole.losses, **EXACT)


def test_fp8_has_no_blocks():
    with pytest.raises(ValueError, match="fp8 has one scale per tensor"):
        awq_clip.search_block(FP8, *problem())


def test_after_scaling_it_judges_in_the_unscaled_inputs_terms():
    weights, moment = problem()
    scale = torch.logspace(-1, 1, 256)
    site = moments.SiteStatistics(moment, torch.ones(2, 256), torch.tensor([9, 9]))
    solution = awq_clip.search_tensor(NVFP4, weights * scale, moments.scaled(site, scale).second_moment)
    clipped = round_to_nearest(NVFP4, weights * scale, solution.amax)
    difference = clipped.dequantize() / scale - weights
    assert_close(solution.losses, squared_error(difference, moment), rtol=1e-4, atol=0)
