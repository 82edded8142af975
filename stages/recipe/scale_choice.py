"""How a recipe wants the block scales of its weights chosen, in the words of `export --scales`.

modelopt calls two of the ways the algorithm `mse`: a sweep over all scales that e4m3 holds, and a choice of
two multiples of the amax for weights that are marked `four_over_six`. Both look at the weights alone.
"""

from typing import Any

from stages.recipe.recipes import Recipe
from stages.settings import ScaleChoice
from state.errors import InputError

FOUR_OVER_SIX = {"start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}
"""modelopt's options that try the largest weight on 6 and on 4."""

WITHOUT_EFFECT = ("layerwise", "distributed_sync")
"""Options that steer how modelopt computes; what is computed stays the same."""


def scales_of(recipe: Recipe) -> ScaleChoice:
    """The recipe's choice. Raises InputError for a search that is another than these."""
    if recipe.algorithm != "mse":
        return "max"
    options = {name: value for name, value in recipe.algorithm_options.items() if name not in WITHOUT_EFFECT}
    sweeps = options.pop("fp8_scale_sweep", False)
    if sweeps and not options:
        return "mse"
    if not sweeps and options == FOUR_OVER_SIX:
        return "four_over_six"
    stated = ", ".join(f"{name}={value!r}" for name, value in recipe.algorithm_options.items())
    raise InputError(
        f"recipe {recipe.name!r} searches scales by the algorithm 'mse' ({stated or 'as it is'}); "
        "supported: fp8_scale_sweep, and the multipliers 1 and 1.5 (four over six); or choose a recipe "
        "without a search and export it with --scales mse"
    )


def marked(block_sizes: dict[Any, Any]) -> bool:
    """Whether a quantizer's blocks are marked for four over six."""
    return bool(block_sizes.get("four_over_six", False))
