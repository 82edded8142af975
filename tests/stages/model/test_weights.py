"""The largest magnitude of weights."""

import pytest
import torch

from stages.model.weights import largest_magnitude

WEIGHTS = torch.tensor([[1.0, -3.0], [0.0, 2.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own(dtype: torch.dtype) -> None:
    found = largest_magnitude(WEIGHTS.to(dtype))
    assert found.dtype == torch.float32
    assert found.tolist() == [3.0, 2.0]


def test_it_is_written_where_it_is_wanted() -> None:
    held = torch.full((3, 2), 9.0)
    assert largest_magnitude(WEIGHTS, out=held[1]).tolist() == [3.0, 2.0]
    assert held.tolist() == [[9.0, 9.0], [3.0, 2.0], [9.0, 9.0]]


def test_it_is_float32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        assert largest_magnitude(torch.tensor([1.001], dtype=torch.float32)).item() == pytest.approx(
            1.001, 1e-6
        )
    finally:
        torch.set_default_dtype(before)
