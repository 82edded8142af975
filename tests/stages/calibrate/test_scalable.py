"""A solver of scales alone is refused where no scale can be folded; one that does more says so."""

import pytest

from stages.calibrate.scalable import nothing_to_scale
from stages.fold.folds import FoldMap, FoldSite, Operand
from stages.recipe.solvers import Solver
from state.errors import InputError

WHY = "folding was not checked for model type 'new'"
NONE = FoldMap({}, {"layers.0.q_proj": WHY, "layers.0.o_proj": WHY, "layers.0.router": "another"})
SITE = FoldSite(
    "norm", "norm", 4, (Operand("norm", "norm.weight", (4,)),), (Operand("q", "q.weight", (4, 4)),)
)
QUANTIZED = {"layers.0.q_proj", "layers.0.o_proj"}


def solver(method: str, awq_first: bool = False) -> Solver:
    return Solver(method, awq_first, True, 0.01, 1.0, f"{method}-0")  # type: ignore[arg-type]


def test_scales_alone_are_refused() -> None:
    with pytest.raises(InputError, match=r"no input of this model \(folding was not .* would change nothing"):
        nothing_to_scale(solver("awq_lite"), "nvfp4_awq_lite", NONE, QUANTIZED)


@pytest.mark.parametrize(("method", "awq_first"), [("awq_full", False), ("gptq", True)])
def test_of_others_the_rest_acts(method: str, awq_first: bool) -> None:
    told = nothing_to_scale(solver(method, awq_first), "some", NONE, QUANTIZED)
    assert told == f"AWQ can scale no input of this model ({WHY}); of recipe 'some' only the rest acts"


@pytest.mark.parametrize("method", ["awq_clip", "gptq"])
def test_solvers_without_scales(method: str) -> None:
    assert nothing_to_scale(solver(method), "some", NONE, QUANTIZED) is None


def test_one_place_is_enough() -> None:
    assert nothing_to_scale(solver("awq_lite"), "some", FoldMap({"norm": SITE}), {"q"}) is None
    with pytest.raises(InputError, match="would change nothing"):
        nothing_to_scale(solver("awq_lite"), "some", FoldMap({"norm": SITE}), {"another"})
