"""GPTQ on literal and small random problems."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4
from stages.formats.quantized import quantize, round_to_nearest
from stages.solve import gptq, moments
from stages.solve.moments import squared_error


def problem(experts: int = 2, rows: int = 24, columns: int = 128, tokens: int = 512):
    """Weights and H of inputs whose channels are correlated and of unequal power, as in a language model."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(experts, rows, columns, generator=generator)
    mixing = torch.randn(experts, columns, columns, generator=generator) / columns**0.5
    power = torch.logspace(0, -1.5, columns)
    inputs = (
        torch.randn(experts, tokens, columns, generator=generator) @ (torch.eye(columns) + mixing) * power
    )
    return weights, inputs.mT @ inputs


def test_column_order_keeps_blocks_together():
    power = torch.tensor([[1.0, 3.0, 2.0, 7.0, 0.0, 4.5], [5.0, 0.0, 0.0, 0.0, 1.0, 2.0]])
    assert gptq.column_order(power, 2).tolist() == [[3, 2, 5, 4, 1, 0], [0, 1, 5, 4, 2, 3]]


def test_column_order_leaves_a_partial_block_last():
    assert gptq.column_order(torch.tensor([[1.0, 2.0, 9.0]]), 2).tolist() == [[1, 0, 2]]


def test_inverse_factor():
    moment = torch.tensor([[[4.0, 2.0], [2.0, 3.0]]])
    factor = gptq.inverse_factor(moment, damping=0.0)
    # H⁻¹ = [[3, -2], [-2, 4]] / 8 = UᵀU.
    assert_close(factor.mT @ factor, torch.tensor([[[0.375, -0.25], [-0.25, 0.5]]]))
    assert factor[0, 1, 0] == 0


def test_a_block_by_hand():
    # Two columns on the grid of integers: 0.4 rounds to 0; its error, 0.4, moves to the second as 0.4 * 0.5 /
    # 1.
    columns = torch.tensor([0.4, 1.4]).view(1, 2, 1)
    factor = torch.tensor([[[1.0, -0.5], [0.0, 2.0]]])
    values, errors, best = gptq.quantize_block(columns, factor, torch.ones(1, 1, 1), INT4_AWQ)
    assert values.flatten().tolist() == [0.0, 2.0]
    assert_close(errors.flatten(), torch.tensor([0.4, -0.2]))
    assert best.tolist() == [[0]]


def test_the_candidate_with_least_compensated_error_is_kept():
    columns = torch.tensor([3.0, 1.0]).view(1, 2, 1)
    factor = torch.eye(2)[None]
    steps = torch.tensor([0.7, 1.0, 2.0]).view(3, 1, 1)
    values, _, best = gptq.quantize_block(columns, factor, steps, INT4_AWQ)
    assert best.item() == 1
    assert values.flatten().tolist() == [3.0, 1.0]


def test_candidate_scales_are_neighbouring_e4m3_values():
    shared = torch.ones(1, 1, 1)
    candidates = NVFP4.candidates(torch.tensor([[6.0, 6.0 * 2**-9, 6.0 * 448]]), shared)
    assert candidates[:, 0].T.tolist() == [
        [0.8125, 0.875, 0.9375, 1.0, 1.125, 1.25],
        [2**-9, 2**-9, 2**-9, 2**-9, 2**-8, 3 * 2**-9],
        [352.0, 384.0, 416.0, 448.0, 448.0, 448.0],
    ]


@pytest.mark.parametrize(("format", "share"), [(NVFP4, 0.5), (INT4_AWQ, 0.5), (INT8_SQ, 0.6), (FP8, 0.6)])
def test_loses_less_than_rounding_to_nearest(format, share):
    weights, moment = problem()
    nearest = squared_error(round_to_nearest(format, weights).dequantize() - weights, moment)
    solved = squared_error(gptq.solve(weights, moment, format).dequantize() - weights, moment)
    assert (solved < share * nearest).all()


@pytest.mark.parametrize("format", [NVFP4, INT4_AWQ, INT8_SQ, FP8])
def test_the_result_is_in_the_format(format):
    weights, moment = problem()
    solved = gptq.solve(weights, moment, format)
    reference = round_to_nearest(format, weights)
    assert solved.scale.shape == reference.scale.shape
    assert solved.scale.dtype == reference.scale.dtype
    assert_close(solved.tensor_scale, reference.tensor_scale, rtol=0, atol=0)
    assert_close(format.round(solved.values), solved.values, rtol=0, atol=0)
    # Rounding the dequantized weights again under the stored scales gives the same values: packing loses
    # nothing.
    again = quantize(format, solved.dequantize(), solved.scale, solved.tensor_scale)
    assert_close(again.values, solved.values, rtol=0, atol=0)


@pytest.mark.parametrize("format", [NVFP4, INT8_SQ])
def test_experts_are_solved_independently(format):
    weights, moment = problem()
    together = gptq.solve(weights, moment, format).dequantize()
    alone = gptq.solve(weights[1:], moment[1:], format).dequantize()
    assert_close(alone, together[1:], rtol=0, atol=0)


@pytest.mark.parametrize("format", [NVFP4, INT8_SQ])
def test_chunks_of_experts_are_joined(format, monkeypatch):
    weights, moment = problem()
    whole = gptq.solve(weights, moment, format)
    monkeypatch.setattr(moments, "CHUNK_ELEMENTS", 1)
    chunked = gptq.solve(weights, moment, format)
    assert_close(chunked.dequantize(), whole.dequantize(), rtol=0, atol=0)
    assert chunked.scale.shape == whole.scale.shape


@pytest.mark.parametrize("format", [NVFP4, INT8_SQ, FP8])
def test_chunks_of_rows_are_solved_independently(format, monkeypatch):
    weights, moment = problem()
    whole = gptq.solve(weights, moment, format).dequantize()
    # Five rows at a time, of 24.
    monkeypatch.setattr(gptq, "BLOCK_ELEMENTS", 2 * 16 * 6 * 5)
    assert_close(gptq.solve(weights, moment, format).dequantize(), whole, rtol=0, atol=1e-6)


def test_an_identity_moment_rounds_each_block_under_its_best_scale():
    weights = torch.tensor([[[6.0, 5.0, *[0.0] * 14], [4.4, 3.3, *[0.0] * 14]]])
    solved = gptq.solve(weights, torch.eye(16)[None], NVFP4, amax=torch.tensor([[[2688.0]]]))
    # First row: a step of 1 gives 6 and 4 (error 1), 1.125 gives 6.75 and 4.5 (0.81), 0.9375 gives 5.625
    # twice (0.53).
    assert solved.scale.float().tolist() == [[[0.9375], [0.75]]]
    assert solved.dequantize()[0, :, :2].tolist() == [[5.625, 5.625], [4.5, 3.0]]


def test_partial_blocks_are_refused():
    with pytest.raises(ValueError, match="nvfp4 needs a multiple of 16 input features, this weight has 24"):
        gptq.solve(torch.ones(1, 2, 24), torch.eye(24)[None], NVFP4)
