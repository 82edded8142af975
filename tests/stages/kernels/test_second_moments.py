"""H of several experts at once."""

import pytest
import torch
from torch.testing import assert_close

from stages.kernels.second_moments import add_second_moments

# Triton's interpreter multiplies no bf16.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def test_literal_rows(device: str) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]], device=device)
    totals = torch.ones(3, 2, 2, device=device)
    add_second_moments(totals, rows, torch.tensor([2, 2, 3], dtype=torch.int32, device=device))
    assert totals.tolist() == [
        [[11.0, 0.0], [0.0, 6.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.25, 3.0], [3.0, 17.0]],
    ]


def test_rows_of_one_site(device: str) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]], device=device)
    totals = torch.ones(1, 2, 2, device=device)
    add_second_moments(totals, rows, None)
    assert totals.tolist() == [[[11.0, 0.0], [0.0, 6.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_their_mirror_images(device: str, dtype: torch.dtype) -> None:
    rows = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    ends = [10, 10, 100, 280]
    totals = torch.zeros(4, 200, 200, device=device)
    add_second_moments(totals, rows, torch.tensor(ends, device=device))
    for total, start, end in zip(totals, [0, *ends], ends, strict=False):
        own = rows[start:end].double()
        assert_close(total.double(), own.mT @ own, rtol=1e-5, atol=1e-3)
    assert torch.equal(totals, totals.mT)
