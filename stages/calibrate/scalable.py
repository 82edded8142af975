"""Whether a solver that scales inputs finds any to scale, before it begins."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain

from stages.fold.candidates import NOTHING, LayerParts, attempts
from stages.recipe.solvers import Solver
from state.errors import InputError

ALTERNATIVES = "nvfp4_awq_clip or general/ptq/nvfp4_default-kv_none-gptq"
"""Recipes that need no scales."""


def nothing_to_scale(
    solver: Solver, recipe: str, layers: Iterable[LayerParts], quantized: Collection[str]
) -> str | None:
    """What to tell people where the solver searches scales and no layer has a place to try; None where all is
    well. Whether a place holds is proven later, layer by layer.

    Raises InputError where scales are all that it searches: the result would be rounding to nearest.
    """
    if not solver.searches_scales:
        return None
    reasons: Counter[str] = Counter()
    for attempt in chain.from_iterable(map(attempts, layers)):
        if attempt.alternatives and any(module in quantized for module in attempt.consumers):
            return None
        reasons[attempt.reason] += 1
    shown = reasons.most_common(1)[0][0] if reasons else NOTHING
    what = f"AWQ can scale no input of this model ({shown})"
    if solver.method == "awq_lite":
        raise InputError(
            f"{what}, so recipe {recipe!r} would change nothing; use one that clips or compensates, such as "
            f"{ALTERNATIVES}"
        )
    return f"{what}; of recipe {recipe!r} only the rest acts"
