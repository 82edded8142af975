"""`export --scales`: how the block scales of weights are chosen, if otherwise than the recipe says."""

from dataclasses import replace

from stages.formats import WeightFormat
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.scale_choice import scales_of
from stages.recipe.solvers import Solver
from stages.settings import ScaleChoice
from stages.unify import PolicyUse
from state.errors import InputError

CHOOSERS = frozenset({"awq_clip", "awq_full", "gptq", "local_hessian"})
"""Solvers that choose the scales of blocks themselves."""


def with_scales(
    quantizers: QuantizerPlan, asked: ScaleChoice | None, solver: Solver | None, cast: bool
) -> tuple[QuantizerPlan, ScaleChoice]:
    """The plan with every weight's format choosing its scales as asked, or else as the recipe says, and that
    choice. Weights of formats without a choice keep theirs.

    Args:
        cast: scales of the source are kept (`--mxfp4-scale cast`).
    Raises InputError where something else chooses the scales, and where there is no such weight.
    """
    choice = scales_of(quantizers.recipe) if asked is None else asked
    if choice == "max":
        return quantizers, choice
    recipe = quantizers.recipe.name
    if solver is not None and solver.method in CHOOSERS:
        raise InputError(
            f"--scales {choice} would choose the scales that {solver.method} of recipe {recipe!r} chooses; "
            "leave one of both out"
        )
    if cast:
        raise InputError(
            f"--mxfp4-scale cast keeps the source's scales, and --scales {choice} (or recipe {recipe!r}) "
            "chooses others; export with --scales max"
        )
    weights = {module: weight.with_scales(choice) or weight for module, weight in quantizers.weights.items()}
    if asked is not None and weights == quantizers.weights:
        raise InputError(
            f"--scales {choice} has nothing to act on: recipe {recipe!r} puts no weight into NVFP4; leave it "
            "out"
        )
    return replace(quantizers, weights=weights), choice


def uses(quantizers: QuantizerPlan, choice: ScaleChoice) -> tuple[PolicyUse, ...]:
    """The choice as it acted, and the weights it could not act on."""
    if choice == "max":
        return ()
    names: dict[bool, list[str]] = {True: [], False: []}
    for module, weight in quantizers.weights.items():
        names[_has_choice(weight)].append(f"{module}.weight_quantizer")
    found = [PolicyUse(f"scales={choice}", tuple(names[True]), "block scales chosen by their squared error")]
    if names[False]:
        detail = f"formats without a choice of scales; they come from the largest weight, not by {choice}"
        found.append(PolicyUse("scales=max", tuple(names[False]), detail))
    return tuple(found)


def _has_choice(weight: WeightFormat) -> bool:
    return weight.with_scales("mse") is not None
