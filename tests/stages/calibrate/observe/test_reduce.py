"""Reductions over tokens, on literal values."""

import pytest
import torch

from stages.calibrate.observe.reduce import CPU_ROWS, Seen, add_groups, add_rows

ROWS = torch.tensor([[1.0, -2.0], [-3.0, 0.5], [0.25, 0.0]], dtype=torch.bfloat16)


def nothing(channels: int, *experts: int) -> Seen:
    return Seen(
        torch.zeros(*experts, channels),
        torch.zeros(*experts, channels, dtype=torch.float64),
        torch.zeros(experts, dtype=torch.int64),
    )


def test_rows() -> None:
    seen = nothing(2)
    add_rows(seen, ROWS)
    assert seen.amax.tolist() == [3.0, 2.0]
    assert seen.total.tolist() == [4.25, 2.5]
    assert seen.tokens.tolist() == 3


def test_rows_are_added_to_what_was_seen() -> None:
    seen = Seen(torch.tensor([2.5, 9.0]), torch.tensor([1.0, 9.0]).double(), torch.tensor(4))
    add_rows(seen, ROWS)
    assert seen.amax.tolist() == [3.0, 9.0]
    assert seen.total.tolist() == [5.25, 11.5]
    assert seen.tokens.tolist() == 7


def test_rows_over_several_chunks() -> None:
    rows = torch.ones(2 * CPU_ROWS + 1, 1)
    rows[CPU_ROWS + 3] = -7
    seen = nothing(1)
    add_rows(seen, rows)
    assert (seen.amax.tolist(), seen.total.tolist()) == ([7.0], [2 * CPU_ROWS + 7.0])


def test_a_value_that_is_no_number_is_kept() -> None:
    seen = nothing(1)
    add_rows(seen, torch.tensor([[1.0], [float("nan")], [2.0]]))
    add_rows(seen, torch.tensor([[4.0]]))
    assert seen.amax.isnan().all() and seen.total.isnan().all()


def test_groups() -> None:
    seen = nothing(2, 3)
    add_groups(seen, ROWS, torch.tensor([1, 1, 3], dtype=torch.int32))
    assert seen.amax.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 0.5]]
    assert seen.total.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.25, 0.5]]
    assert seen.tokens.tolist() == [1, 0, 2]


def test_rows_past_the_last_end_belong_to_nobody() -> None:
    seen = nothing(2, 2)
    add_groups(seen, ROWS, torch.tensor([1, 2]))
    assert seen.amax.tolist() == [[1.0, 2.0], [3.0, 0.5]]
    assert seen.tokens.tolist() == [1, 1]


@pytest.mark.parametrize("split", [1, 2, 3])
def test_sums_agree_however_rows_are_split(split: int) -> None:
    rows = torch.randn(96, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole, parts = nothing(8), nothing(8)
    add_rows(whole, rows)
    for part in rows.split(96 // split):
        add_rows(parts, part)
    assert torch.equal(parts.total.float(), whole.total.float())
