"""Inputs as engines round them."""

import pytest
import torch
from torch import Tensor

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, W4A8_AWQ, WeightFormat


def test_fp8_rounds_and_saturates() -> None:
    x = torch.tensor([1.0, 1000.0, -3.3, 0.0], dtype=torch.bfloat16)
    found = FP8.round_input(x, torch.tensor(0.5))
    assert found.dtype == torch.bfloat16 and found.tolist() == [1.0, 224.0, -3.25, 0.0]


def test_int8_rounds_and_saturates() -> None:
    x = torch.tensor([1.0, 100.0, -3.3, -70.0])
    assert INT8_SQ.round_input(x, torch.tensor(0.5)).tolist() == [1.0, 63.5, -3.5, -64.0]


def test_nvfp4_has_a_scale_for_each_block() -> None:
    """Amax / 6 in e4m3: 1; 448, the largest; 0 below half of the smallest, which makes the block zeros."""
    row = [[6.0, 2.4, -2.5, 0.25, 0.26, 5.0, -5.1, 0.0] * 2, [5376.0, 448.0] * 8, [0.005, -0.001] * 8]
    found = NVFP4.round_input(torch.tensor([row]).flatten(1), torch.tensor(1.0))
    first, second, third = found.view(3, 16).tolist()
    assert first == [6.0, 2.0, -2.0, 0.0, 0.5, 4.0, -6.0, 0.0] * 2
    assert second == [2688.0, 448.0] * 8
    assert third == [0.0, 0.0] * 8


def test_nvfp4_block_scales_are_e4m3_of_the_input_scale() -> None:
    """Amax 7 over 6 times 0.5 is 2.333, in e4m3 2.25: steps of 1.125, and 7 is clipped at 6 of them."""
    x = torch.tensor([7.0, 1.0, *[0.0] * 14])
    assert NVFP4.round_input(x, torch.tensor(0.5)).tolist() == [6.75, 1.125, *[0.0] * 14]


def as_an_engine(x: Tensor, scale: Tensor) -> Tensor:
    """vLLM's `ref_nvfp4_quant` and `cast_to_fp4`, with exact quotients, dequantized."""
    blocks = x.float().unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True)
    block_scale = (largest / (6.0 * scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    each = block_scale * scale
    inverse = torch.where(each == 0, 0, blocks / each)
    magnitude, sign = inverse.abs().clamp(max=6.0), inverse.sign()
    code = torch.full_like(magnitude, 6.0)
    for value, within in (
        (4.0, magnitude <= 5.0),
        (3.0, magnitude < 3.5),
        (2.0, magnitude <= 2.5),
        (1.5, magnitude < 1.75),
        (1.0, magnitude <= 1.25),
        (0.5, magnitude < 0.75),
        (0.0, magnitude <= 0.25),
    ):
        code[within] = value
    return (code * sign * each).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("amax", [0.5, 30.0, 20000.0])
def test_nvfp4_equals_an_engines_arithmetic(amax: float, dtype: torch.dtype) -> None:
    """Ordinary inputs, and such that the largest or the smallest block scale is not enough for."""
    chance = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 256, generator=chance) * torch.rand(64, 256, generator=chance) * 8).to(dtype)
    scale = NVFP4.input_scale(torch.tensor(amax))
    found = NVFP4.round_input(x, scale)
    assert found.dtype == dtype and found.equal(as_an_engine(x, scale)) and not found.equal(x)


@pytest.mark.parametrize("format", [INT4_AWQ, W4A8_AWQ], ids=["int4_awq", "w4a8_awq"])
def test_others_say_that_they_cannot(format: WeightFormat) -> None:
    with pytest.raises(NotImplementedError, match=f"the inputs of {format.name} can't be simulated"):
        format.round_input(torch.ones(128), torch.tensor(1.0))
