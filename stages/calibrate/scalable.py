"""Whether a solver that scales inputs finds any to scale, before it begins."""

from collections import Counter
from collections.abc import Collection

from stages.fold.folds import FoldMap
from stages.recipe.solvers import Solver
from state.errors import InputError

ALTERNATIVES = "nvfp4_awq_clip or general/ptq/nvfp4_default-kv_none-gptq"
"""Recipes that need no scales."""


def nothing_to_scale(solver: Solver, recipe: str, folds: FoldMap, quantized: Collection[str]) -> str | None:
    """What to tell people where the solver searches scales and can fold none; None where all is well.

    Raises InputError where scales are all that it searches: the result would be rounding to nearest.
    """
    if solver.method not in ("awq_lite", "awq_full") and not solver.awq_first:
        return None
    if any(part.module in quantized for site in folds.sites.values() for part in site.consumers):
        return None
    reasons = Counter(why for module, why in folds.impossible.items() if module in quantized)
    shown = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
    what = f"AWQ can scale no input of this model{shown}"
    if solver.method == "awq_lite":
        raise InputError(
            f"{what}, so recipe {recipe!r} would change nothing; use one that clips or compensates, such as "
            f"{ALTERNATIVES}"
        )
    return f"{what}; of recipe {recipe!r} only the rest acts"
