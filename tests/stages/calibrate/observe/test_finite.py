"""The first site that overflowed is named: by layer, then as the forward comes to it."""

import numpy as np

from stages.calibrate.observe.finite import first_overflow, overflow_message
from state.layout import Layout, SiteArray
from state.names import Site

ACTIVATIONS = ("amax", "abs_sum", "tokens")
LAYOUT = Layout(
    arrays=(
        SiteArray(pattern="m.L", role="k", layers=(0, 1), channels=2, statistics=ACTIVATIONS),
        SiteArray(pattern="m.L.o", role="input", layers=(0, 1), channels=2, statistics=ACTIVATIONS),
        SiteArray(pattern="m.L.q", role="input", layers=(0, 1), channels=2, statistics=ACTIVATIONS),
        SiteArray(
            pattern="m.L.experts.E.up", role="input", layers=(1,), experts=2, channels=2,
            statistics=ACTIVATIONS,
        ),
        SiteArray(pattern="head", role="input", channels=2, statistics=ACTIVATIONS),
        SiteArray(pattern="head", role="weight", statistics=("weight_amax",)),
    )
)  # fmt: skip
MODULES = ("m.0.q", "m.0.o", "m.1.q", "m.1.o", "head", "m.1.experts.0.up", "m.1.experts.1.up")


def first(*places: tuple[str, int | tuple[int, ...]]) -> Site | None:
    arrays = {f"amax/{a.key}": np.ones(a.shape("amax")) for a in LAYOUT.arrays if a.role != "weight"}
    for key, place in places:
        arrays[f"amax/{key}"][place] = np.inf
    return first_overflow(LAYOUT, arrays, MODULES)


def test_numbers_and_what_was_never_seen() -> None:
    assert first() is None
    arrays = {f"amax/{a.key}": np.full(a.shape("amax"), np.nan) for a in LAYOUT.arrays if a.role != "weight"}
    assert first_overflow(LAYOUT, arrays, MODULES) is None


def test_the_first_of_the_forward() -> None:
    assert first(("head.input", 1), ("m.L.experts.E.up.input", (0, 1, 0))) == Site(
        "m.1.experts.1.up", "input"
    )
    assert first(("m.L.q.input", 1), ("m.L.o.input", 0), ("m.L.k", 0)) == Site("m.0", "k")
    assert first(("m.L.q.input", 0), ("m.L.k", 0)) == Site("m.0.q", "input")
    assert first(("head.input", 0)) == Site("head", "input")


def test_what_is_said() -> None:
    told = overflow_message(Site("m.3.q", "input"), "float16", "holdfast calibrate again")
    assert told == (
        "m.3.q (input) saw inf or NaN in layer 3, computed in float16: the model overflows, and nothing can "
        "be made of that. Give another RUN: holdfast calibrate again"
    )
    assert "bfloat16, which reaches as far as float32" in overflow_message(
        Site("head", "input"), "bfloat16", ""
    )
