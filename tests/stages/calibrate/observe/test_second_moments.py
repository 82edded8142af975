"""H of literal rows, and how many tokens it is the sum over."""

import torch

from stages.calibrate.observe.second_moments import Moments
from state.layout import SiteArray

CPU = torch.device("cpu")
LINEAR = SiteArray(pattern="layers.L.up", role="input", layers=(0, 3), channels=2, statistics=())
EXPERTS = SiteArray(
    pattern="layers.L.experts.E.up", role="input", layers=(3,), experts=3, channels=2, statistics=()
)


def test_tokens_of_one_site() -> None:
    moments = Moments({LINEAR.key}, CPU)
    moments.add(LINEAR, (1,), torch.tensor([[[1.0, 2.0], [0.0, 3.0]]]))
    moments.add(LINEAR, (1,), torch.tensor([[1.0, 0.0]]))
    assert moments.of(LINEAR).tolist() == [[[2.0, 2.0], [2.0, 13.0]]]
    assert moments.tokens_of(LINEAR).tolist() == [3] and moments.tokens_of(LINEAR).dtype == torch.int64


def test_tokens_of_experts_in_one_call_or_one_by_one() -> None:
    rows, ends = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([2, 2, 3])
    together, alone = Moments({EXPERTS.key}, CPU), Moments({EXPERTS.key}, CPU)
    together.add_experts(EXPERTS, (0,), rows, ends)
    alone.add(EXPERTS, (0, 0), rows[:2])
    alone.add(EXPERTS, (0, 2), rows[2:])
    for moments in (together, alone):
        assert moments.tokens_of(EXPERTS).tolist() == [2, 0, 1]
        assert moments.of(EXPERTS).tolist() == [
            [[1.0, 2.0], [2.0, 13.0]],
            [[0.0, 0.0], [0.0, 0.0]],
            [[1.0, 0.0], [0.0, 0.0]],
        ]


def test_nothing_seen_is_no_tokens() -> None:
    moments = Moments({LINEAR.key, EXPERTS.key}, CPU)
    moments.add(LINEAR, (0,), torch.empty(0, 2))
    assert moments.tokens_of(LINEAR).tolist() == [0]
    assert moments.tokens_of(EXPERTS).tolist() == [0, 0, 0]
