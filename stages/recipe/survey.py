"""Every recipe that modelopt ships: served or why not, and what it takes.

A recipe is judged on a model, by placing its quantizers there. Without a model of the person's own that is
the reference model; rules for modules that it does not have, such as Mamba's, are judged on its attention.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from stages.formats import WeightFormat
from stages.model.skeleton import Skeleton
from stages.recipe.exportable import require_exportable
from stages.recipe.quantizer_plan import CASTS, QuantizerPlan
from stages.recipe.quantizers import plan_quantizers, quantizer_names
from stages.recipe.recipes import Recipe, resolve
from stages.recipe.scale_choice import scales_of
from stages.recipe.solvers import solver_of
from stages.settings import ScaleChoice
from state.errors import InputError

Needs = Literal["nothing", "channel statistics", "a solver pass"]
KINDS = (
    "weight_quantizer",
    "input_quantizer",
    "output_quantizer",
    "q_bmm_quantizer",
    "k_bmm_quantizer",
    "v_bmm_quantizer",
    "p_bmm_quantizer",
)
STAND_IN, EMBEDDING = "*self_attn.", "*embed_tokens."
"""Before a quantizer's kind: where rules are judged whose modules the model does not have."""
WIDE = 4096
"""Rows and columns of the weight that bits are counted of."""


@dataclass(frozen=True)
class Surveyed:
    """A recipe and what is to be said of it.

    reason: why it is not served, None where it is. needs: what an export takes from a run besides its
    identity. bits: weight format → bits of a weight, its scales included. cache: format of the KV cache.
    scales: how block scales are chosen. solver: None for recipes without one. stood_in: rules, by the names
    of their quantizers, that the model has no module for. left_out: module or quantizer that stays as it is
    → why.
    """

    name: str
    reason: str | None = None
    needs: Needs = "nothing"
    bits: dict[str, float] = field(default_factory=dict)
    cache: str | None = None
    scales: ScaleChoice = "max"
    solver: str | None = None
    stood_in: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        return self.reason is None


def survey(name: str, skeleton: Skeleton, stand_in: bool) -> Surveyed:
    """Judge one recipe on a model. stand_in: rules for modules that it does not have count too."""
    try:
        recipe = resolve(name)
        parts, apart = [recipe], tuple[str, ...]()
        if stand_in:
            parts, apart = _parts(recipe, skeleton)
        plans = [_plan(part, skeleton) for part in parts]
        solvers = [solver for plan in plans if (solver := solver_of(plan)) is not None]
    except InputError as error:
        return Surveyed(name, str(error))
    weights = {weight.name: weight for plan in plans for weight in plan.weights.values()}
    caches = [cache for plan in plans for cache in plan.kv.values()]
    needs: Needs = "nothing"
    if any(map(_observes, plans)) or solvers:
        needs = "channel statistics"
    if any(solver.needs_pass for solver in solvers):
        needs = "a solver pass"
    return Surveyed(
        name,
        needs=needs,
        bits={name: bits_per_weight(weight) for name, weight in sorted(weights.items())},
        cache=caches[0] if caches else None,
        scales=scales_of(recipe),
        solver=solvers[0].method if solvers else None,
        stood_in=apart,
        left_out={module: why for plan in plans for module, why in plan.left_out.items()},
    )


def bits_per_weight(weight: WeightFormat) -> float:
    """Of a large matrix, its scales included."""
    sizes = {"U8": 8, "I8": 8, "F8_E4M3": 8, "F32": 32}
    total = 0
    for _, dtype, shape in weight.stored(WIDE, WIDE):
        count = sizes[dtype]
        for axis in shape:
            count *= axis
        total += count
    return round(total / WIDE**2, 3)


def _plan(recipe: Recipe, skeleton: Skeleton) -> QuantizerPlan:
    plan = plan_quantizers(skeleton, recipe)
    matrices = {module: skeleton.matrix(module) for module in plan.weights}
    require_exportable(plan, matrices, skeleton.tensors)
    return plan


def _observes(plan: QuantizerPlan) -> bool:
    return bool(plan.inputs.keys() - plan.constant_inputs.keys()) or any(
        cache not in CASTS for cache in plan.kv.values()
    )


def _parts(recipe: Recipe, skeleton: Skeleton) -> tuple[list[Recipe], tuple[str, ...]]:
    """The recipe, unless the model has none of the weights it quantizes; and one for each kind of module that
    the model does not have, with the rules for it.
    """
    names = quantizer_names(skeleton)
    known: list[dict[str, Any]] = []
    strange: dict[str, list[dict[str, Any]]] = {}
    for rule in _enabling(recipe):
        pattern = rule["quantizer_name"]
        if any(fnmatchcase(name, pattern) for name in names):
            known.append(rule)
        else:
            strange.setdefault(_stem(pattern), []).append(rule)
    placed = any("weight_quantizer" in _kinds(rule) for rule in known)
    parts = {"": recipe} if placed else {}
    for rules in strange.values():
        aimed = [
            rule | {"quantizer_name": f"{_stand_in(rule)}*{kind}"} for rule in rules for kind in _kinds(rule)
        ] + ([] if placed else known)
        if any("weight_quantizer" in _kinds(rule) for rule in rules):
            config = [{"quantizer_name": "*", "enable": False}, *aimed]
            parts.setdefault(repr(aimed), replace(recipe, quant_cfg=config))
    if not parts:
        raise InputError(
            f"recipe {recipe.name!r} places no quantizer on a weight, so there is nothing to export by it; "
            "choose one that does"
        )
    return list(parts.values()), tuple(rule["quantizer_name"] for rules in strange.values() for rule in rules)


def _enabling(recipe: Recipe) -> Iterator[dict[str, Any]]:
    return (rule for rule in recipe.quant_cfg if rule.get("cfg") and rule.get("enable") is not False)


def _stem(pattern: str) -> str:
    """`*mixer.experts.*weight_quantizer` → `*mixer.experts.*`."""
    return pattern.removesuffix(_tail(pattern) + "*" * pattern.endswith("*"))


def _tail(pattern: str) -> str:
    return re.split(r"[.*]", pattern.rstrip("*"))[-1]


def _stand_in(rule: dict[str, Any]) -> str:
    return EMBEDDING if "embed" in rule["quantizer_name"] else STAND_IN


def _kinds(rule: dict[str, Any]) -> list[str]:
    """The kinds of quantizers that a rule can name."""
    tail = _tail(rule["quantizer_name"]).removeprefix("_")
    return [kind for kind in KINDS if fnmatchcase(kind, f"*{tail}")]
