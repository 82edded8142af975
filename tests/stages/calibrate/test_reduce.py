"""Reductions over tokens, on literal values."""

import pytest
import torch

from stages.calibrate.reduce import CPU_ROWS, reduce_groups, reduce_rows

ROWS = torch.tensor([[1.0, -2.0], [-3.0, 0.5], [0.25, 0.0]], dtype=torch.bfloat16)


def test_rows() -> None:
    amax, total = reduce_rows(ROWS)
    assert amax.tolist() == [3.0, 2.0]
    assert total.tolist() == [4.25, 2.5]
    assert total.dtype == torch.float64


def test_rows_over_several_chunks() -> None:
    rows = torch.ones(2 * CPU_ROWS + 1, 1)
    rows[CPU_ROWS + 3] = -7
    amax, total = reduce_rows(rows)
    assert (amax.tolist(), total.tolist()) == ([7.0], [2 * CPU_ROWS + 7.0])


def test_a_value_that_is_no_number_is_kept() -> None:
    amax, total = reduce_rows(torch.tensor([[1.0], [float("nan")], [2.0]]))
    assert amax.isnan().all() and total.isnan().all()


def test_groups() -> None:
    amax, total, tokens = reduce_groups(ROWS, torch.tensor([1, 1, 3], dtype=torch.int32))
    assert amax.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 0.5]]
    assert total.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.25, 0.5]]
    assert tokens.tolist() == [1, 0, 2]


def test_rows_past_the_last_end_belong_to_nobody() -> None:
    amax, _, tokens = reduce_groups(ROWS, torch.tensor([1, 2]))
    assert amax.tolist() == [[1.0, 2.0], [3.0, 0.5]]
    assert tokens.tolist() == [1, 1]


@pytest.mark.parametrize("split", [1, 2, 3])
def test_sums_agree_however_rows_are_split(split: int) -> None:
    rows = torch.randn(96, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = reduce_rows(rows)[1]
    parts = sum(reduce_rows(part)[1] for part in rows.split(96 // split))
    assert torch.equal(torch.as_tensor(parts).float(), whole.float())
