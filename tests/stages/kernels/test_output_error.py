"""Output errors of several changes of several weights."""

import pytest
import torch
from torch.testing import assert_close

from stages.kernels.output_error import TILE, output_error

# Triton's interpreter multiplies no bf16.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def test_literal_matrices(device: str) -> None:
    difference = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]], [[[1.0, 0.0]], [[2.0, -1.0]]]], device=device)
    moment = torch.tensor([[[5.0, 1.0], [1.0, 1.0]], [[25.0, 5.0], [5.0, 2.0]]], device=device)
    assert output_error(difference, moment).tolist() == [[13.0, 18.0], [5.0, 82.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_several_tiles(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(2, 3, TILE + 40, 2 * TILE + 48, generator=generator).to(dtype)
    inputs = torch.randn(3, 500, 2 * TILE + 48, generator=generator)
    moment = (inputs.mT @ inputs).to(dtype)
    expected = ((difference.double() @ moment.double()) * difference.double()).sum((2, 3))
    assert_close(
        output_error(difference.to(device), moment.to(device)).cpu().double(), expected, rtol=1e-5, atol=0
    )
