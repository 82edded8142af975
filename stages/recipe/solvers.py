"""Which solver a recipe asks for, and the names under which its solutions are stored. Pure data.

A solver searches what `max` takes as it comes: the scale of each input channel, where to clip, how to round.
Its solutions lie in the run under the solver's id, one group per decoder layer; export applies them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from stages.formats import TABLE
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.solve import more_windows, rounding
from stages.unify import Policies
from state.errors import InputError
from state.identity import digest_json
from state.names import split_name

Method = Literal["awq_lite", "awq_clip", "awq_full", "gptq", "local_hessian", "smoothquant", "tune"]

MATHS_VERSION = 4
"""Goes up when a change of stages/solve changes what a solver finds."""

INPUT_POLICIES = Policies()
"""Those under which the inputs that solvers with two streams see are unified before they are rounded."""

AWQ_LITE_FIXED = {"alpha_step": 0.1}
AWQ_CLIP_FIXED = {"min_clip_ratio": 0.5, "shrink_step": 0.05}
LOCAL_HESSIAN_FIXED: dict[str, float] = {"fp8_scale_sweep": True, "block_size": 16}
FIXED: dict[Method, dict[str, float]] = {
    "awq_lite": AWQ_LITE_FIXED,
    "awq_clip": AWQ_CLIP_FIXED,
    "awq_full": AWQ_LITE_FIXED | AWQ_CLIP_FIXED,
    "gptq": {},
    "local_hessian": LOCAL_HESSIAN_FIXED,
    "smoothquant": {},
    "tune": {},
}
"""Options of modelopt's that can be given with this value only."""

WITHOUT_EFFECT = ("debug", "layerwise", "max_co_batch_size", "max_tokens_per_batch", "block_size", "fused")
"""Options that steer how modelopt computes; what is computed here stays the same."""


@dataclass(frozen=True)
class Solver:
    """A solver as a recipe asks for it.

    Attributes:
        awq_first: GPTQ rounds weights that AWQ lite has scaled.
        needs_pass: it works from Σ xxᵀ, which a pass over the tokens collects. SmoothQuant does not, and is
            computed at export.
        damping: GPTQ's, relative to the mean of H's diagonal.
        alpha: SmoothQuant's migration strength.
        id: name of its solutions in a run: equal for equal results.
    """

    method: Method
    awq_first: bool
    needs_pass: bool
    damping: float
    alpha: float
    id: str

    @property
    def two_streams(self) -> bool:
        """Whether it sees inputs as engines will: out of quantized layers, rounded. Where scales are searched
        too, they would have to be folded into each layer first.
        """
        return self.method == "tune" or (self.method == "gptq" and not self.awq_first)

    @property
    def searches_scales(self) -> bool:
        """Whether it searches a scale for input channels, to be folded into what stands before them."""
        return self.method in ("awq_lite", "awq_full") or self.awq_first


def solver_of(quantizers: QuantizerPlan) -> Solver | None:
    """The solver of a plan's recipe; None where it asks for scales alone (`max`, `mse`).

    Raises InputError for an option, weight format or block size that the solver does not have.
    """
    recipe = quantizers.recipe
    if recipe.algorithm in ("max", "mse"):
        return None
    if recipe.algorithm not in get_args(Method):
        raise InputError(
            f"recipe {recipe.name!r} asks for the algorithm {recipe.algorithm!r}; "
            f"supported: max, mse, {', '.join(get_args(Method))}"
        )
    method = cast(Method, recipe.algorithm)
    options = dict(recipe.algorithm_options)
    damping = float(options.pop("perc_damp", 0.01)) if method == "gptq" else 0.01
    alpha = float(options.pop("alpha", 1.0)) if method == "smoothquant" else 1.0
    _check_options(recipe.name, method, FIXED[method] | (AWQ_LITE_FIXED if recipe.awq_first else {}), options)
    for name, weight in sorted(quantizers.weights.items()):
        if method not in weight.solvers or weight.block_size != weight.standard_block:
            solved = (format.described for format in TABLE.values() if method in format.solvers)
            raise InputError(
                f"recipe {recipe.name!r} quantizes {name} to {weight.name} in blocks of {weight.block_size}, "
                f"which {method} can't solve; supported: {', '.join(solved)}"
            )
    weights = sorted((name, weight.name, weight.block_size) for name, weight in quantizers.weights.items())
    identity: dict[str, Any] = {
        "method": method,
        "awq_first": recipe.awq_first,
        "damping": damping,
        "alpha": alpha,
        "weights": weights,
        "maths": MATHS_VERSION,
    }
    solver = Solver(method, recipe.awq_first, method != "smoothquant", damping, alpha, id="")
    if method == "tune":
        identity["tuning"] = rounding.FIXED | more_windows.FIXED
    if solver.two_streams:
        identity["behind"] = "quantized layers"
        if quantizers.inputs:
            identity["inputs"] = {"rounded under": asdict(INPUT_POLICIES)}
    short = digest_json(identity).rpartition(":")[2][:8]
    return replace(solver, id=f"{method}-{short}")


def stacked_name(module: str) -> str:
    """A hub name with `E` in the place of the expert number: one name for all experts of a layer."""
    pattern, layer, _ = split_name(module)
    return ".".join(str(layer) if part == "L" else part for part in pattern.split("."))


def array_name(module: str, field: str) -> tuple[str, int | None]:
    """Where a solution keeps a field of a module: the array's name, and the expert's place on its first axis.

    `model.layers.3.mlp.experts.17.up_proj`, `scale` → (`model.layers.3.mlp.experts.E.up_proj@scale`, 17).
    """
    return f"{stacked_name(module)}@{field}", split_name(module)[2]


def _check_options(
    recipe: str, method: Method, fixed: Mapping[str, float], options: Mapping[str, Any]
) -> None:
    for name, value in options.items():
        if value in (fixed[name], None) if name in fixed else name in WITHOUT_EFFECT:
            continue
        allowed = f"only {fixed[name]} is supported" if name in fixed else "it is not supported"
        raise InputError(f"recipe {recipe!r} gives {method} the option {name}={value!r}; {allowed}")
