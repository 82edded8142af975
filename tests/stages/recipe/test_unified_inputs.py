"""The one amax of each input of a plan, from literal observations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.formats import FP8
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe
from stages.recipe.unified_inputs import expert_families, input_quantizer, solver_inputs, unified_inputs
from stages.unify import Policies
from state.errors import InputError

Q, K, UP = "layers.0.q_proj", "layers.0.k_proj", "layers.0.up_proj"
EXPERTS = [f"layers.0.experts.{number}.up_proj" for number in range(3)]


def plan(*modules: str, **fields: Any) -> QuantizerPlan:
    recipe = Recipe("test", [], "max", {})
    weights = dict.fromkeys(modules, FP8)
    return QuantizerPlan(recipe, weights, {module: input_quantizer(module) for module in modules}, **fields)


def observed(**amax: Any) -> dict[str, Tensor]:
    return {input_quantizer(name): torch.tensor(value) for name, value in amax.items()}


def values(found: dict[str, Tensor | None]) -> dict[str, float | None]:
    return {name: None if amax is None else amax.item() for name, amax in found.items()}


def test_groups_share_the_largest_and_others_keep_their_own() -> None:
    seen = observed(**{Q: [1.0, 4.0], K: [2.0, 3.0], UP: 5.0})
    found, uses = unified_inputs(seen, plan(Q, K, UP), [], [(Q, K)], Policies())
    assert values(found) == {Q: 4.0, K: 4.0, UP: 5.0} and uses == ()


def test_members_that_saw_one_tensor_and_disagree_are_told_of() -> None:
    seen = observed(**{Q: 2.0, K: 1.0})
    found, uses = unified_inputs(seen, plan(Q, K), [(Q, K)], [], Policies())
    assert values(found) == {Q: 2.0, K: 2.0}
    assert [use.policy for use in uses] == ["conflict=max"]
    with pytest.raises(InputError, match=r"--conflict max"):
        unified_inputs(seen, plan(Q, K), [(Q, K)], [], Policies(conflict="error"))


def test_an_amax_that_the_recipe_fixes_is_not_observed() -> None:
    found, _ = unified_inputs(
        observed(**{Q: 3.0}), plan(Q, UP, constant_inputs={UP: 7.0}), [], [], Policies()
    )
    assert values(found) == {Q: 3.0, UP: 7.0}


def test_what_is_not_observed_at_all_is_left_out() -> None:
    assert values(unified_inputs(observed(**{Q: 3.0}), plan(Q, UP), [], [], Policies())[0]) == {Q: 3.0}


def test_fused_experts_share_one_and_unseen_ones_take_it() -> None:
    seen = observed(**dict(zip(EXPERTS, (1.0, math.nan, 4.0), strict=True)))
    fused = plan(*EXPERTS, fused_experts=frozenset(EXPERTS))
    assert set(values(unified_inputs(seen, fused, [], [], Policies())[0]).values()) == {4.0}
    apart, _ = unified_inputs(seen, plan(*EXPERTS), [], [], Policies(unseen="weights-only"))
    assert values(apart) == dict(zip(EXPERTS, (1.0, None, 4.0), strict=True))


def test_experts_of_a_layer_are_one_family_in_order() -> None:
    """What belongs to no expert is left out."""
    modules = ["layers.0.o_proj", *reversed(EXPERTS), "layers.1.experts.0.up_proj"]
    assert expert_families(modules) == {
        "layers.0.experts.E.up_proj": EXPERTS,
        "layers.1.experts.E.up_proj": ["layers.1.experts.0.up_proj"],
    }


def test_solvers_see_what_an_export_writes() -> None:
    """Under the policies that are the default; an expert that no token reached has its layer's largest."""
    seen = observed(**dict(zip((Q, K, *EXPERTS), (2.0, 1.0, 1.0, math.nan, 4.0), strict=True)))
    fused = plan(Q, K, *EXPERTS, fused_experts=frozenset(EXPERTS))
    found = solver_inputs(seen, fused, [], [(Q, K)])
    assert found == unified_inputs(seen, fused, [], [(Q, K)], Policies())[0]
    assert values(found) == {Q: 2.0, K: 2.0} | dict.fromkeys(EXPERTS, 4.0)


def test_inputs_that_nothing_is_known_of_stay_as_they_are() -> None:
    """An export refuses these, or leaves their scales out; a solver goes on."""
    others = [module.replace("experts", "shared.experts") for module in EXPERTS[:2]]
    seen = observed(**{Q: 2.0, UP: math.nan} | dict.fromkeys(EXPERTS, math.nan), **dict.fromkeys(others, 3.0))
    made = plan(Q, UP, *EXPERTS, *others)
    assert values(solver_inputs(seen, made, [], [])) == {Q: 2.0} | dict.fromkeys(others, 3.0)
    with pytest.raises(InputError):
        unified_inputs(seen, made, [], [], Policies())
