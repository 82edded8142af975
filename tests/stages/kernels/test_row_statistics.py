"""Statistics of rows, against literal values and against torch."""

import pytest
import torch

from stages.kernels import row_statistics

ROWS = torch.tensor([[1.0, -2.0], [-3.0, 0.5], [0.25, 0.0]], dtype=torch.bfloat16)


def test_groups_are_added_to_what_was_seen(device: str) -> None:
    amax = torch.tensor([[0.5, 7.0], [1.0, 1.0], [0.0, 0.0]], device=device)
    total = torch.ones(3, 2, dtype=torch.float64, device=device)
    tokens = torch.tensor([5, 6, 0], device=device)
    ends = torch.tensor([1, 1, 3], dtype=torch.int32, device=device)
    row_statistics.add_groups(amax, total, tokens, ROWS.to(device), ends)
    assert amax.tolist() == [[1.0, 7.0], [1.0, 1.0], [3.0, 0.5]]
    assert total.tolist() == [[2.0, 3.0], [1.0, 1.0], [4.25, 1.5]]
    assert tokens.tolist() == [6, 6, 2]


def test_experts_of_many_parts_and_of_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_statistics, "EXPERTS", row_statistics.Tiles(32, 16, 8, 2, 4))
    counts = [0, 700, 1, 0, 33, 32, 5, 0]
    ends = torch.tensor(counts).cumsum(0).int()
    rows = torch.randn(sum(counts) + 9, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    amax, total = torch.zeros(8, 40, device=device), torch.zeros(8, 40, dtype=torch.float64, device=device)
    tokens = torch.zeros(8, dtype=torch.int64, device=device)
    own = rows[: sum(counts)].double().abs().split(counts)
    for times in (1, 2):
        row_statistics.add_groups(amax, total, tokens, rows.to(device), ends.to(device))
        assert tokens.tolist() == [times * count for count in counts]
        for expert, values in enumerate(own):
            # Sums of few values of 8 bits are exact in float64.
            assert torch.equal(total[expert].cpu(), times * values.sum(0))
            assert torch.equal(amax[expert].cpu(), values.amax(0).float() if len(values) else torch.zeros(40))


def test_rows_past_the_last_end_belong_to_nobody(device: str) -> None:
    amax, total = torch.zeros(2, 2, device=device), torch.zeros(2, 2, dtype=torch.float64, device=device)
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    row_statistics.add_groups(amax, total, tokens, ROWS.to(device), torch.tensor([1, 2], device=device))
    assert amax.tolist() == [[1.0, 2.0], [3.0, 0.5]]
    assert tokens.tolist() == [1, 1]


def test_rows_of_one_site(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * row_statistics.SITE.part + 3, 200, generator=generator).bfloat16()
    amax, total = torch.zeros(200, device=device), torch.zeros(200, dtype=torch.float64, device=device)
    tokens = torch.tensor(4, device=device)
    row_statistics.add_rows(amax, total, tokens, rows.to(device))
    assert torch.equal(amax.cpu(), rows.float().abs().amax(0))
    # Sums of 1,027 values of 8 bits are exact in float64.
    assert torch.equal(total.cpu(), rows.double().abs().sum(0))
    assert tokens.item() == 4 + len(rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays(device: str, value: float) -> None:
    amax, total = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.float64, device=device)
    tokens = torch.tensor(0, device=device)
    row_statistics.add_rows(amax, total, tokens, torch.tensor([[1.0, 1.0], [value, 2.0]], device=device))
    row_statistics.add_rows(amax, total, tokens, torch.tensor([[9.0, 9.0]], device=device))
    expected = torch.tensor([value, 9.0])
    assert torch.equal(amax.cpu().nan_to_num(-1), expected.nan_to_num(-1))
    assert not total[0].isfinite() and total[1] == 12


def test_rows_may_be_part_of_a_wider_tensor(device: str) -> None:
    wide = torch.arange(12.0, device=device).view(3, 4)
    amax, total = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.float64, device=device)
    row_statistics.add_rows(amax, total, torch.tensor(0, device=device), wide[:, 1:3])
    assert amax.tolist() == [9.0, 10.0]
    assert total.tolist() == [15.0, 18.0]
