"""SmoothQuant's formula on literal values."""

import torch
from torch.testing import assert_close

from stages.solve.smoothquant import pre_quant_scale


def test_alpha_one_divides_by_the_activations_amax():
    weights = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    assert pre_quant_scale(torch.tensor([4.0, 0.5]), weights).tolist() == [0.25, 2.0]


def test_alpha_one_half_balances_activations_and_weights():
    weights = torch.tensor([[[1.0, -4.0], [9.0, 0.5]]])
    scale = pre_quant_scale(torch.tensor([[4.0, 16.0]]), weights, alpha=0.5)
    assert_close(scale, torch.tensor([[1.5, 0.5]]))


def test_scales_are_clamped_and_a_dead_channel_gets_the_largest():
    scale = pre_quant_scale(torch.tensor([1e6, 0.0, 1e-6]), torch.ones(2, 3))
    assert_close(scale, torch.tensor([1e-4, 1e4, 1e4]))


def test_a_dead_channel_keeps_one_where_another_scale_vanishes():
    scale = pre_quant_scale(torch.tensor([2.0**40, 0.0, 1.0]), torch.ones(2, 3))
    assert_close(scale, torch.tensor([1e-4, 1.0, 1.0]))
