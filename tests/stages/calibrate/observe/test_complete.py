"""Statistics that do not hold the tokens that went through the model are refused; right ones never are."""

import numpy as np
import pytest

from stages.calibrate.observe.complete import require_tokens
from state.errors import DamagedStore
from state.layout import Layout, SiteArray

ACTIVATIONS = ("amax", "abs_sum", "tokens")
LAYOUT = Layout(
    arrays=(
        SiteArray(pattern="m.L.q", role="input", layers=(0, 1), channels=4, statistics=ACTIVATIONS),
        SiteArray(pattern="m.L.wide", role="input", layers=(0, 1), channels=4, statistics=ACTIVATIONS),
        SiteArray(
            pattern="m.L.experts.E.up",
            role="input",
            layers=(1,),
            experts=2,
            channels=4,
            statistics=ACTIVATIONS,
        ),
        SiteArray(pattern="m.L", role="k", layers=(0, 1), channels=4, statistics=ACTIVATIONS),
        SiteArray(pattern="vision.L.q", role="input", layers=(0, 1, 2), channels=4, statistics=ACTIVATIONS),
        SiteArray(pattern="head", role="input", channels=4, statistics=ACTIVATIONS),
        SiteArray(pattern="head", role="weight", statistics=("weight_amax",)),
    )
)


def held(q: list[int], wide: list[int], head: int) -> dict[str, np.ndarray]:
    counts = {
        "m.L.q.input": q,
        "m.L.wide.input": wide,
        "m.L.experts.E.up.input": [[3, 9]],
        "m.L.k": [2, 5],
        "vision.L.q.input": [-1, -1, -1],
        "head.input": head,
    }
    return {f"tokens/{key}": np.array(count) for key, count in counts.items()}


def test_all_tokens() -> None:
    """Experts see a part of them, some linears each one several times, other towers none."""
    require_tokens(LAYOUT, held([8, 8], [32, 7], 8), 8, before=None)
    require_tokens(LAYOUT, held([-1, 8], [8, 16], 8), 8, before=None)


def test_layers_that_are_yet_to_come() -> None:
    require_tokens(LAYOUT, held([8, -1], [32, -1], -1), 8, before=1)
    require_tokens(LAYOUT, held([8, 4], [32, 4], 4), 8, before=1)


@pytest.mark.parametrize(
    ("q", "wide", "head", "message"),
    [
        ([8, 4], [32, 4], 8, r"in layer 1 hold 4 tokens \(of m\.1\.q\), but 8 went through"),
        ([16, 8], [64, 8], 8, r"in layer 0 hold 16 tokens \(of m\.0\.q\)"),
        ([8, 8], [32, 8], 9, r"outside the layers hold 9 tokens \(of head\)"),
    ],
)
def test_too_few_and_too_many(q: list[int], wide: list[int], head: int, message: str) -> None:
    with pytest.raises(DamagedStore, match=message):
        require_tokens(LAYOUT, held(q, wide, head), 8, before=None)
