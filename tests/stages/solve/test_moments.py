"""Losses from second moments, and the prior of experts with few tokens."""

import torch
from torch.testing import assert_close

from stages.solve.moments import SiteStatistics, scaled, squared_error, with_prior


def test_squared_error_is_the_outputs_error_summed_over_tokens():
    difference = torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]])
    inputs = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[5.0, 1.0], [0.0, -1.0]]])
    # Expert 0: 3 and 2; expert 1: 3 and -3.
    assert squared_error(difference, inputs.mT @ inputs).tolist() == [13.0, 18.0]


def site() -> SiteStatistics:
    moment = torch.tensor([[[6.0, 2.0], [2.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    return SiteStatistics(moment, torch.tensor([[4.0, 2.0], [0.0, 0.0]]), torch.tensor([4, 0]))


def test_abs_mean_of_an_expert_without_tokens_is_zero():
    assert site().abs_mean.tolist() == [[1.0, 0.5], [0.0, 0.0]]


def test_prior_in_a_common_basis_is_the_layers_mean_token():
    expected = torch.tensor([[[9.0, 3.0], [3.0, 3.0]], [[3.0, 1.0], [1.0, 1.0]]])
    found = with_prior(site(), tokens=2, common_basis=True)
    assert_close(found.second_moment, expected, rtol=0, atol=0)
    assert found.abs_sum.tolist() == [[6.0, 3.0], [2.0, 1.0]]
    assert found.tokens.tolist() == [6, 2]


def test_prior_without_a_common_basis_is_the_mean_power_and_magnitude():
    expected = torch.tensor([[[8.0, 2.0], [2.0, 4.0]], [[2.0, 0.0], [0.0, 2.0]]])
    found = with_prior(site(), tokens=2, common_basis=False)
    assert_close(found.second_moment, expected, rtol=0, atol=0)
    assert found.abs_sum.tolist() == [[5.5, 3.5], [1.5, 1.5]]
    assert found.tokens.tolist() == [6, 2]


def test_a_layer_without_tokens_falls_back_to_the_weights_own_error():
    empty = SiteStatistics(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    found = with_prior(empty, tokens=64, common_basis=True)
    assert found.second_moment.tolist() == [[[1.0, 0.0], [0.0, 1.0]]]
    assert found.abs_sum.tolist() == [[0.0, 0.0]]
    assert found.tokens.tolist() == [0]


def test_scaled_statistics_are_those_of_scaled_inputs():
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    site = SiteStatistics((x.T @ x)[None], x.abs().sum(0)[None], torch.tensor([2]))
    scale = torch.tensor([2.0, 0.5])
    y = x / scale
    assert scaled(site, scale).second_moment.tolist() == (y.T @ y)[None].tolist()
    assert scaled(site, scale[None]).abs_sum.tolist() == y.abs().sum(0)[None].tolist()
