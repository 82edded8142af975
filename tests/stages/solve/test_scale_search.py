"""Block scales searched alone."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import FP8, INT8_SQ, NVFP4
from stages.formats.quantized import Quantized, quantize, round_to_nearest
from stages.solve import awq_clip, moments, scale_search
from stages.solve.moments import block_errors, diagonal_blocks, squared_error


def problem(experts: int = 2, rows: int = 8, columns: int = 64):
    """Heavy-tailed weights, and H of correlated inputs of unequal power."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(experts, rows, columns, generator=generator) ** 3
    mixing = torch.eye(columns) + torch.randn(experts, columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(experts, 256, columns, generator=generator) @ mixing
    inputs *= torch.logspace(0, -1.5, columns)
    return weights, inputs.mT @ inputs


def rounded(weights: torch.Tensor, amax: torch.Tensor) -> Quantized:
    """The weights to nearest under what was found, as an export rounds them."""
    shared = NVFP4.search_scale(weights)
    return quantize(NVFP4, weights, NVFP4.scales_from_amax(amax, shared), shared)


def test_every_scale_is_a_code_of_e4m3():
    scales = NVFP4.every_scale()
    assert scales is not None and len(scales) == 126
    assert (scales.diff() > 0).all()
    assert scales[[0, 1, -2, -1]].tolist() == [2**-9, 2**-8, 416.0, 448.0]


def test_literal_scales():
    # The first row makes the global scale 1.
    weights = torch.zeros(1, 3, 16)
    weights[0, 0, 0] = 2688.0
    weights[0, 1, :2] = torch.tensor([4.4, 3.3])
    found = scale_search.search(NVFP4, weights, torch.eye(16)[None])
    # 448 * 6 exactly; 4 and 3 steps of 1.125 leave 0.01 + 0.0056; zeros lose nothing under any scale.
    assert rounded(weights, found.amax).scale.float().flatten().tolist() == [448.0, 1.125, 2**-9]
    assert_close(found.losses.flatten(), torch.tensor([0.0, 0.1**2 + 0.075**2, 0.0]))
    # With a thousand times the power in the second channel, what is nearest to 3.3 counts: 2 steps of 1.625,
    # and 3 for the other.
    powerful = torch.ones(16)
    powerful[1] = 1000.0
    found = scale_search.search(NVFP4, weights, powerful.diag()[None])
    assert rounded(weights, found.amax).dequantize()[0, 1, :2].tolist() == [4.875, 3.25]


def test_no_scale_loses_less():
    weights, moment = problem()
    found = scale_search.search(NVFP4, weights, moment)
    within = diagonal_blocks(moment, 16)
    shared = NVFP4.search_scale(weights)
    blocks = rounded(weights, found.amax)
    own = block_errors(NVFP4.blocks(blocks.dequantize() - weights), within)
    assert_close(own, found.losses)
    for scale in NVFP4.every_scale():
        other = quantize(NVFP4, weights, scale.expand(2, 8, 4), shared).dequantize() - weights
        assert (found.losses <= block_errors(NVFP4.blocks(other), within) * (1 + 1e-5)).all()
    assert (found.losses <= awq_clip.search_block(NVFP4, weights, moment).losses * (1 + 1e-5)).all()


def test_the_output_loses_less_than_by_rounding_to_nearest():
    weights, moment = problem(rows=64)
    nearest = squared_error(round_to_nearest(NVFP4, weights).dequantize() - weights, moment)
    amax = scale_search.search(NVFP4, weights, moment).amax
    assert (squared_error(rounded(weights, amax).dequantize() - weights, moment) < 0.9 * nearest).all()


def test_channels_that_were_always_zero_keep_their_weights():
    weights, moment = problem()
    moment[:, 16:32] = 0
    moment[:, :, 16:32] = 0
    found = rounded(weights, scale_search.search(NVFP4, weights, moment).amax).dequantize()
    plain = scale_search.search(NVFP4, weights, torch.eye(64).expand(2, 64, 64)).amax
    assert_close(found[..., 16:32], rounded(weights, plain).dequantize()[..., 16:32], rtol=0, atol=0)


def test_experts_are_searched_independently(monkeypatch):
    weights, moment = problem()
    whole = scale_search.search(NVFP4, weights, moment)
    monkeypatch.setattr(moments, "CHUNK_ELEMENTS", 1)
    chunked = scale_search.search(NVFP4, weights, moment)
    assert_close(chunked.amax, whole.amax, rtol=0, atol=0)


@pytest.mark.parametrize("format", [FP8, INT8_SQ])
def test_formats_without_block_scales_are_refused(format):
    with pytest.raises(ValueError, match="has no block scales that could be tried one by one"):
        scale_search.search(format, *problem())
