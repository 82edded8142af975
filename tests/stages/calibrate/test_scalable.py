"""A solver of scales alone is refused where no scale has a place to be tried; one that does more says so."""

import pytest

from stages.calibrate.scalable import nothing_to_scale
from stages.fold.candidates import NOTHING, LayerParts
from stages.fold.folds import Operand
from stages.recipe.solvers import Solver
from state.errors import InputError

QUERY, OUTPUT = (Operand(name, f"{name}.weight", (4, 4)) for name in ("q", "o"))
WHY = "norm has no weight that could be divided"
WEIGHTLESS = [LayerParts({"q": QUERY}, {"norm": ["q"]})]
NORM = [LayerParts({"q": QUERY}, {"norm": ["q"]}, shapes={"norm.weight": (4,)})]


def solver(method: str, awq_first: bool = False) -> Solver:
    return Solver(method, awq_first, True, 0.01, 1.0, f"{method}-0")  # type: ignore[arg-type]


def test_scales_alone_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"no input of this model \(norm has no weight .* change nothing; use"
    ):
        nothing_to_scale(solver("awq_lite"), "nvfp4_awq_lite", WEIGHTLESS, {"q"})
    with pytest.raises(InputError, match=NOTHING):
        nothing_to_scale(solver("awq_lite"), "nvfp4_awq_lite", [LayerParts({"o": OUTPUT})], {"o"})


@pytest.mark.parametrize(("method", "awq_first"), [("awq_full", False), ("gptq", True)])
def test_of_others_the_rest_acts(method: str, awq_first: bool) -> None:
    told = nothing_to_scale(solver(method, awq_first), "some", WEIGHTLESS, {"q"})
    assert told == f"AWQ can scale no input of this model ({WHY}); of recipe 'some' only the rest acts"


@pytest.mark.parametrize("method", ["awq_clip", "gptq"])
def test_solvers_without_scales(method: str) -> None:
    assert nothing_to_scale(solver(method), "some", WEIGHTLESS, {"q"}) is None


def test_one_place_is_enough() -> None:
    assert nothing_to_scale(solver("awq_lite"), "some", NORM, {"q"}) is None
    with pytest.raises(InputError, match="would change nothing"):
        nothing_to_scale(solver("awq_lite"), "some", NORM, {"another"})
