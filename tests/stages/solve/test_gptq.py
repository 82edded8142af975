"""GPTQ on literal and small random problems."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4
from stages.formats.quantized import quantize, round_to_nearest, step
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
    latents, errors, best = gptq.quantize_block(columns, factor, torch.ones(1, 1, 1), INT4_AWQ)
    assert_close(latents.flatten(), torch.tensor([0.4, 1.6]))
    assert_close(errors.flatten(), torch.tensor([0.4, -0.2]))
    assert best.tolist() == [[0]]


def test_the_candidate_with_least_compensated_error_is_kept():
    columns = torch.tensor([3.0, 1.0]).view(1, 2, 1)
    factor = torch.eye(2)[None]
    steps = torch.tensor([0.7, 1.0, 2.0]).view(3, 1, 1)
    latents, _, best = gptq.quantize_block(columns, factor, steps, INT4_AWQ)
    assert best.item() == 1
    assert latents.flatten().tolist() == [3.0, 1.0]


def test_candidate_scales_are_neighbouring_e4m3_values():
    shared = torch.ones(1, 1, 1)
    candidates = NVFP4.candidates(torch.tensor([[6.0, 6.0 * 2**-9, 6.0 * 448, 0.0]]), shared)
    smallest = 2**-9
    assert candidates[:, 0].T.tolist() == [
        [0.8125, 0.875, 0.9375, 1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75],
        [smallest * times for times in (1, 1, 1, 1, 2, 3, 4, 5, 6, 7)],
        [352.0, 384.0, 416.0, *[448.0] * 7],
        # A block of zeros is scaled by 1, as one whose amax is 6.
        [0.8125, 0.875, 0.9375, 1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75],
    ]
    assert len(candidates) == NVFP4.candidates_count


def test_four_over_six():
    # Under amax / 6 = 1, 4.9 becomes 4 or 6; under 1.5, 6 is 4 steps and 4.9 is 3.27.
    weights = torch.tensor([[[6.0, *[4.9] * 4, *[0.0] * 11]]])
    solved = gptq.solve(weights, torch.eye(16)[None], NVFP4, amax=torch.tensor([[[2688.0]]]))
    assert solved.scale.float().tolist() == [[[1.625]]]
    assert solved.values[0, 0, :5].tolist() == [4.0, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(("format", "fewer"), [(NVFP4, slice(6)), (NVFP4, slice(3, 4)), (INT4_AWQ, slice(3))])
def test_a_wider_search_never_leaves_a_larger_error(format, fewer):
    weights, moment = problem()
    size = format.block_size
    columns = weights.mT[:, :size].contiguous()
    columns[:, :, 0] = 0
    factor = gptq.inverse_factor(moment, gptq.DAMPING)[:, :size, :size]
    shared = format.search_scale(weights)
    tried = format.candidates(columns.abs().amax(1), shared)
    steps = tried if shared is None else tried * shared[..., 0]

    def error(some):
        return gptq.quantize_block(columns, factor, some, format)[1].square().sum(1)

    wide, narrow = error(steps), error(steps[fewer])
    assert (wide <= narrow).all() and (wide < narrow).any()


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


@pytest.mark.parametrize("format", [NVFP4, INT4_AWQ, INT8_SQ, FP8])
def test_latents_round_to_the_solution(format):
    weights, moment = problem()
    weights[0, 0] = 0
    moment[1] = 0  # an expert that no token reached, in a layer without a prior
    solved, latents = gptq.solve_latent(weights, moment, format)
    alone = gptq.solve(weights, moment, format)
    assert_close(solved.values, alone.values, rtol=0, atol=0)
    assert_close(solved.scale, alone.scale, rtol=0, atol=0)
    assert_close(format.round(latents), solved.values, rtol=0, atol=0)
    assert latents.dtype == torch.float32 and latents.shape == weights.shape
    assert latents.abs().max() <= format.bound + 0.5
    # Nothing is compensated in the second expert: its latents are its own weights.
    steps = step(solved.scale, solved.tensor_scale)[1, ..., None]
    own = (format.blocks(weights[1]) / steps).flatten(-2).clamp(-format.bound - 0.5, format.bound + 0.5)
    assert_close(latents[1], own, rtol=0, atol=0)
    assert (latents[0, 0] == 0).all()


def test_latents_lie_in_the_order_of_the_weights():
    weights = torch.zeros(1, 1, 32)
    weights[..., 5], weights[..., 20] = 5.0, -3.0
    power = torch.ones(32)
    power[20] = 4.0  # the second block is visited first, and its column 20 before the others
    solved, latents = gptq.solve_latent(weights, power.diag()[None], NVFP4, amax=torch.tensor([[[2688.0]]]))
    steps = solved.scale.float()[0, 0]
    assert latents[0, 0, [5, 20]].tolist() == [5.0 / steps[0].item(), -3.0 / steps[1].item()]
    assert latents.count_nonzero() == 2


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
    monkeypatch.setattr(
        gptq, "BLOCK_ELEMENTS", 2 * 16 * (format.candidates_count if format.block_size else 1) * 5
    )
    assert_close(gptq.solve(weights, moment, format).dequantize(), whole, rtol=0, atol=1e-6)


def test_an_identity_moment_rounds_each_block_under_its_best_scale():
    weights = torch.tensor([[[6.0, 5.0, *[0.0] * 14], [4.4, 3.3, *[0.0] * 14]]])
    solved = gptq.solve(weights, torch.eye(16)[None], NVFP4, amax=torch.tensor([[[2688.0]]]))
    # First row: a step of 1 gives 6 and 4 (error 1), 0.9375 gives 5.625 twice (0.53), 1.5 gives 6 and 4.5
    # (0.25). Second: 0.75 gives 4.5 and 3 (0.1), 1.125 gives 4.5 and 3.375 (0.016).
    assert solved.scale.float().tolist() == [[[1.5], [1.125]]]
    assert solved.dequantize()[0, :, :2].tolist() == [[6.0, 4.5], [4.5, 3.375]]


def test_partial_blocks_are_refused():
    with pytest.raises(ValueError, match="nvfp4 needs a multiple of 16 input features, this weight has 24"):
        gptq.solve(torch.ones(1, 2, 24), torch.eye(24)[None], NVFP4)
