"""Scales of blocks by least squared error, on literal values and against trying every scale."""

import itertools

import pytest
import torch
from torch import Tensor

from stages.formats import NVFP4
from stages.formats.nvfp4 import Nvfp4
from stages.formats.weight_format import tensor_amax
from stages.settings import ScaleChoice
from tests.stages.formats.test_packing import random_weights


def packed(weight: Tensor, scales: ScaleChoice, amax: float | None = None) -> tuple[Tensor, Tensor]:
    """The block scales as numbers, and the weights an engine computes with."""
    chosen = NVFP4.with_scales(scales)
    assert isinstance(chosen, Nvfp4) and chosen.scales == scales
    largest = tensor_amax(weight).reshape(()) if amax is None else torch.tensor(amax)
    shared = chosen.tensor_scale(largest)
    scale = chosen.block_scale(weight, shared)
    stored = {"weight": chosen.pack(weight, shared, scale), "weight_scale": scale, "weight_scale_2": shared}
    return scale.float(), chosen.dequantize(stored)


def test_four_over_six_puts_what_fits_on_four() -> None:
    # 5 lies in the middle of e2m1's widest gap: with 6 on 4, 5 is 3.33 instead, near 3.
    six, four = [6.0, 3.0] + [0.5] * 14, [6.0, 4.5] + [4.5] * 14
    scale, made = packed(torch.tensor([six, four]), "four_over_six")
    assert scale.tolist() == [[256.0], [384.0]]
    assert made.tolist() == [six, four]
    assert packed(torch.tensor([four]), "max")[1].tolist() == [[6.0, 4.0] + [4.0] * 14]


def test_four_over_six_keeps_six_where_both_are_equal() -> None:
    weight = torch.tensor([[6.0] + [0.0] * 15, [0.0] * 16])
    # A block of zeros has amax / 6 = 1, in units of 6 / 1536.
    assert packed(weight, "four_over_six")[0].tolist() == [[256.0], [256.0]]


def test_a_sweep_clips_where_that_is_better() -> None:
    # Under a step of 1 the fifteen become 4; under 384/448 all sixteen become 5.14.
    weight = torch.tensor([[6.0] + [5.0] * 15])
    assert packed(weight, "max")[0].tolist() == [[448.0]]
    scale, made = packed(weight, "mse")
    assert scale.tolist() == [[384.0]]
    torch.testing.assert_close(made, torch.full((1, 16), 6 * 384 / 448))


def test_a_sweep_takes_the_smallest_of_equal_scales() -> None:
    weight = torch.tensor([[1.5, 0.5] * 8, [0.0] * 16])
    scale, made = packed(weight, "mse", 6.0)
    assert made.equal(weight)
    # 1.5 as 6, steps of a quarter of weight_scale_2 = 1/448; zeros under e4m3's smallest.
    assert scale.tolist() == [[112.0], [2.0**-9]]


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_a_sweep_finds_what_trying_every_scale_finds(spread: float) -> None:
    every = NVFP4.every_scale()
    for weight in itertools.islice(random_weights(2**23, 5), 3):
        weight = weight[:200] * spread
        weight[7] *= 3e-4  # blocks whose scales are e4m3's smallest
        shared = NVFP4.tensor_scale(tensor_amax(weight).reshape(()))
        chosen = NVFP4.with_scales("mse")
        found = chosen.block_scale(weight, shared).float().flatten()
        blocks = weight.float().view(-1, 16)
        errors = torch.stack([squared_error(blocks, scale * shared) for scale in every])
        ours = squared_error(blocks, found * shared)
        assert ours.le(errors.amin(0) * (1 + 1e-5)).all()


def squared_error(blocks: Tensor, steps: Tensor) -> Tensor:
    steps = steps.reshape(-1, 1)
    return (NVFP4.round(blocks / steps) * steps - blocks).square().sum(-1)


@pytest.mark.parametrize("scales", ["mse", "four_over_six"])
def test_searched_scales_are_no_worse(scales: ScaleChoice) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    errors = {choice: packed(weight, choice)[1].sub(weight).square().sum() for choice in ("max", scales)}
    assert errors[scales] < errors["max"]


def test_a_solvers_amax_counts_before_a_search() -> None:
    weight = torch.tensor([[6.0, 3.0] * 8])
    chosen = NVFP4.with_scales("mse")
    scale = chosen.block_scale(weight, chosen.tensor_scale(torch.tensor(6.0)), torch.tensor([[3.0]]))
    assert scale.float().tolist() == [[224.0]]
