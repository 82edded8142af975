"""Gradient steps on rounding, in exact values."""

import pytest
import torch

from stages.formats import NVFP4
from stages.formats.quantized import Quantized
from stages.solve import rounding
from stages.solve.rounding import (
    Latent,
    against_noise,
    loss_scale,
    orders,
    rate_of,
    token_errors,
    token_weights,
)

BLOCK = [0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.1, -0.3, -0.7, -1.2, -1.8, -2.4, -3.6, 6.5]
"""Latents: ties, which go to the even mantissa, values beside them, and one beyond the grid."""
ROUNDED = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -0.5, -0.5, -1.0, -2.0, -2.0, -4.0, 6.0]


def latent(values: list[list[float]]) -> Latent:
    """Experts of one row and one block each."""
    own = torch.tensor(values)[:, None]
    scale = torch.full((len(own), 1, 1), 2.0).to(torch.float8_e4m3fn)
    quantized = Quantized(NVFP4, NVFP4.round(own), scale, torch.full((len(own), 1, 1), 0.5))
    return Latent.of(quantized, own)


def test_latents_are_rounded_to_the_grid_under_the_scales_they_began_with() -> None:
    found = latent([BLOCK]).rounded()
    assert found.values.tolist() == [[ROUNDED]]
    assert found.dequantize().tolist() == [[ROUNDED]]  # the step is 2 * 0.5
    assert found.scale.float().tolist() == [[[2.0]]] and found.tensor_scale is not None
    assert latent([BLOCK]).weights(torch.bfloat16).tolist() == [[ROUNDED]]


def test_a_step_goes_against_the_sign_of_the_mean_gradient() -> None:
    own = latent([[0.0] * 16])
    first = torch.tensor([[[1e-6, -5.0, 0.0] + [0.0] * 13]])
    own.move(first, 0.25)
    assert own.values[0, 0, :4].tolist() == [-0.25, 0.25, 0.0, 0.0]
    # The mean remembers: .9 * .1 * 5 against .1 * 4; and a small one against it turns nothing.
    own.move(torch.tensor([[[-1e-9, 4.0, 0.0] + [0.0] * 13]]), 0.125)
    assert own.values[0, 0, :4].tolist() == [-0.375, 0.375, 0.0, 0.0]


def test_an_expert_that_no_token_reached_stays_as_it_was() -> None:
    own = latent([BLOCK, BLOCK])
    gradient = torch.stack([torch.ones(1, 16), torch.zeros(1, 16)])
    for number in range(3):
        own.move(gradient.bfloat16(), rate_of(number))
    assert own.values[1].equal(torch.tensor([BLOCK]))
    assert (own.values[0] < torch.tensor([BLOCK])).all()


def test_the_rate_falls_to_nothing() -> None:
    assert rate_of(0) == 0.005
    assert rate_of(50) == 0.0025
    assert rate_of(99) == pytest.approx(0.00005)
    assert sum(map(rate_of, range(100))) == pytest.approx(0.2525)


def test_every_round_takes_every_batch_once() -> None:
    found = orders(batches=5, together=2, layer=3)
    assert len(found) == 100 and all(len(step) == 2 for step in found)
    for start in range(0, 100, 2):  # two steps a round; the fifth batch waits
        batches = found[start] + found[start + 1]
        assert len(set(batches)) == 4 and set(batches) <= set(range(5))
    assert {batch for step in found for batch in step} == set(range(5))


def test_orders_are_the_same_every_time_and_others_in_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert orders(7, 1, layer=0) == orders(7, 1, layer=0)
    assert orders(7, 1, layer=0) != orders(7, 1, layer=1)
    before = orders(7, 1, layer=0)
    monkeypatch.setattr(rounding, "SEED", 99)
    assert orders(7, 1, layer=0) != before


def test_one_batch_is_every_step() -> None:
    assert orders(1, 1, layer=0) == [[0]] * 100


def test_tokens_weigh_what_makes_them_alike() -> None:
    target = torch.tensor([[[2.0, 2.0], [0.0, 4.0], [1.0, 1.0]]])
    assert token_weights(target).tolist() == [[0.25, 0.125, 1.0]]


def test_tokens_that_are_nothing_beside_the_others_weigh_what_the_floor_says() -> None:
    """Else one of them would outweigh all, or make the loss infinite."""
    target = torch.tensor([[[4.0, 4.0], [4.0, 4.0], [4.0, 4.0], [1e-23, 0.0], [0.0, 0.0]]])
    floor = 1 / torch.tensor(16 * 1e-4)
    assert token_weights(target)[0].tolist() == [1 / 16] * 3 + [floor.item()] * 2
    assert token_weights(torch.zeros(1, 2, 4)).isfinite().all()


def test_the_loss_is_scaled_by_a_power_of_two() -> None:
    """Gradients of an output are about 1 / (channels * |y|)."""
    assert loss_scale(torch.full((1, 3, 64), 8.0)) == 64 * 8 / 16
    assert loss_scale(torch.full((1, 3, 64), 8.5)) == 64 * 8 / 16
    assert loss_scale(torch.zeros(1, 3, 64)) > 0


def test_token_errors_are_means_over_channels() -> None:
    output, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -2.0]])
    assert token_errors(output.bfloat16(), target.bfloat16()).tolist() == [8.0]


def test_tokens_far_off_count_less() -> None:
    assert against_noise(torch.tensor([0.0, 2.0, 6.0])).tolist() == [1.0, 0.5, 0.25]
    assert against_noise(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
