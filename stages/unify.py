"""Unification: from what each quantizer observed to the one number its format stores.

Pure functions over tensors: no I/O, no modules. Wherever the observations leave a choice, a named policy
makes it, and its use is returned together with every quantizer it touched. Amax values are float32, scalars
`[]` or vectors `[channels]`, in the units of the activation; NaN throughout means that the quantizer was
never observed, 0 that it was and saw only zeros.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.settings import ConflictPolicy, DeadPolicy, ExpertInputScale, UnseenPolicy
from state.errors import InputError

DEAD_AMAX = 1.0
"""What `dead=floor` puts in place of a dead amax: a scale and a reciprocal that are ordinary numbers."""

DEAD_BELOW = torch.finfo(torch.float32).tiny * 6 * 448
"""A scalar below this is dead: its NVFP4 scale is no normal float32, and engines take the reciprocal."""

AGREEMENT = 2.0**-7
"""How far, relatively, members that saw one tensor may differ: one rounding step of bfloat16."""

SHOWN = 5


@dataclass(frozen=True)
class Policies:
    """The choices of one export.

    unseen: an expert that no token reached takes the max over its layer's experts (`layer`), is stored
    without an input scale (`weights-only`), or is an error. conflict: members that saw one tensor and
    disagree by more than AGREEMENT take their max, or are an error. dead: a zero becomes DEAD_AMAX (`floor`),
    or is an error. expert_input_scale: fused experts share one scale per `layer`, or each `expert` has one.
    """

    unseen: UnseenPolicy = "layer"
    conflict: ConflictPolicy = "max"
    dead: DeadPolicy = "floor"
    expert_input_scale: ExpertInputScale = "layer"


@dataclass(frozen=True)
class PolicyUse:
    """One policy that acted, as `name=value`, on these quantizers."""

    policy: str
    quantizers: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class ExpertFamily:
    """One projection's quantizers across the experts of one layer.

    fused: the model class stores the experts fused, so that modelopt and engine kernels use one input scale
    for all of them. together: the checkpoint does too, and has room for one scale alone.
    """

    name: str
    quantizers: tuple[str, ...]
    fused: bool
    together: bool = False


@dataclass(frozen=True)
class Unified:
    """amax: quantizer → float32 `[]`, None where `unseen=weights-only` leaves it out. uses: what acted."""

    amax: dict[str, Tensor | None]
    uses: tuple[PolicyUse, ...]


def unify(
    observed: Mapping[str, Tensor],
    same_input: Sequence[Sequence[str]] = (),
    engine_fused: Sequence[Sequence[str]] = (),
    families: Sequence[ExpertFamily] = (),
    policies: Policies = Policies(),
) -> Unified:
    """One scalar amax per quantizer.

    Args:
        observed: quantizer → amax, `[]` or `[channels]`.
        same_input: groups of quantizers that one tensor reached; their values must agree.
        engine_fused: groups that engines run as one matrix; their values may differ, the scale may not.
        families: expert projections. Names in groups and families that are not in `observed` are passed over.
    Raises InputError naming the quantizer for non-finite and negative values, for one that nothing observed,
    and where a policy says `error`.
    """
    values = {name: _checked(name, amax) for name, amax in observed.items()}
    uses = _conflicts(values, same_input, policies.conflict)
    group_of = connected(values, [*same_input, *engine_fused])
    scalars: dict[str, Tensor | None] = {}
    for group in dict.fromkeys(group_of.values()):
        seen = [value for name in group if (value := values[name]) is not None]
        scalars.update(dict.fromkeys(group, merge(seen).max() if seen else None))
        missing = tuple(name for name in group if values[name] is None)
        if seen and missing:
            uses.append(PolicyUse("unobserved=group", missing, "never observed; took the value of its group"))
    decided, family_uses = _families(scalars, families, policies)
    _refuse_unobserved(decided, families)
    floored, dead_uses = floor_dead(decided, policies.dead)
    return Unified(floored, (*uses, *family_uses, *dead_uses))


def merge(values: Sequence[Tensor]) -> Tensor:
    """Elementwise max of scalars `[]` and vectors `[channels]`; a scalar counts for every channel."""
    widths = {value.shape[0] for value in values if value.dim() == 1}
    if len(widths) > 1:
        raise InputError(
            f"members of one group were observed with different channel counts: {sorted(widths)}"
        )
    result = values[0]
    for value in values[1:]:
        result = torch.maximum(result, value)
    return result


def connected(names: Iterable[str], groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Name → all names that the groups connect it with, itself included, in the order of `names`."""
    order = list(names)
    root = {name: name for name in order}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for group in groups:
        present = [name for name in group if name in root]
        for name in present[1:]:
            root[find(name)] = find(present[0])
    members: dict[str, list[str]] = {}
    for name in order:
        members.setdefault(find(name), []).append(name)
    return {name: tuple(group) for group in members.values() for name in group}


def floor_dead(
    amax: Mapping[str, Tensor | None], policy: DeadPolicy
) -> tuple[dict[str, Tensor | None], list[PolicyUse]]:
    """Replace scalars below DEAD_BELOW by DEAD_AMAX, or raise InputError naming them."""
    dead = tuple(name for name, value in amax.items() if value is not None and value.item() < DEAD_BELOW)
    if not dead:
        return dict(amax), []
    if policy == "error":
        raise InputError(
            f"{_shown(dead)}: amax is zero (or too small for a finite reciprocal) and --dead error forbids "
            f"to floor it; export with --dead floor to store the scale of amax {DEAD_AMAX}"
        )
    floored = {**amax, **dict.fromkeys(dead, torch.tensor(DEAD_AMAX))}
    return floored, [PolicyUse("dead=floor", dead, f"observed and dead; amax set to {DEAD_AMAX}")]


def _checked(name: str, amax: Tensor) -> Tensor | None:
    """The amax in float32, None when never observed. Raises InputError unless all is finite and >= 0."""
    value = amax.detach().to(torch.float32)
    if value.dim() > 1:
        raise InputError(
            f"{name}: amax has shape {list(value.shape)}; a scalar or one value per channel is needed"
        )
    if bool(value.isnan().all()):
        return None
    wrong = ~value.isfinite() | (value < 0)
    if bool(wrong.any()):
        first = value.flatten()[wrong.flatten()][0].item()
        raise InputError(
            f"{name}: {int(wrong.sum())} of {value.numel()} amax values are not finite and non-negative "
            f"(first: {first}); the model overflows or the statistics are wrong: calibrate again, in a wider "
            "dtype or on other data"
        )
    return value


def _conflicts(
    values: Mapping[str, Tensor | None], same_input: Sequence[Sequence[str]], policy: ConflictPolicy
) -> list[PolicyUse]:
    uses = []
    for group in same_input:
        seen = {name: value for name in group if (value := values.get(name)) is not None}
        if len(seen) < 2:
            continue
        gap = _disagreement(list(seen.values()))
        if gap <= AGREEMENT:
            continue
        names = tuple(seen)
        if policy == "error":
            raise InputError(
                f"{_shown(names)} saw one tensor but their amax values differ by {gap:.3g} of the larger "
                f"(allowed: {AGREEMENT:.3g}); export with --conflict max to take the larger"
            )
        uses.append(PolicyUse("conflict=max", names, f"differ by {gap:.3g} of the larger; took the max"))
    return uses


def _disagreement(values: list[Tensor]) -> float:
    """Largest difference relative to the larger value, by channel; of the maxima where shapes mix."""
    if len({value.shape for value in values}) > 1:
        values = [value.max() for value in values]
    stacked = torch.stack(values).to(torch.float64)
    low, high = stacked.amin(dim=0), stacked.amax(dim=0)
    return float(torch.where(high > 0, (high - low) / high, 0.0).max())


def _families(
    scalars: Mapping[str, Tensor | None], families: Sequence[ExpertFamily], policies: Policies
) -> tuple[dict[str, Tensor | None], list[PolicyUse]]:
    decided, uses = dict(scalars), []
    for family in families:
        members = [name for name in family.quantizers if name in scalars]
        seen = {name: value for name in members if (value := scalars[name]) is not None}
        unseen = tuple(name for name in members if name not in seen)
        _refuse_own_scales(family, bool(seen and unseen), policies)
        if unseen and policies.unseen == "error":
            raise InputError(
                f"{_shown(unseen)}: no token of the calibration text reached these experts and --unseen "
                "error forbids to go on; calibrate on more text, or export with --unseen layer"
            )
        if unseen and policies.unseen == "weights-only":
            uses.append(
                PolicyUse(
                    "unseen=weights-only", unseen, "no token reached the expert; no input scale written"
                )
            )
        if not seen:
            continue
        layer = merge(list(seen.values()))
        if unseen and policies.unseen == "layer":
            decided.update(dict.fromkeys(unseen, layer))
            uses.append(
                PolicyUse("unseen=layer", unseen, "no token reached the expert; took the max over its layer")
            )
        if family.fused and policies.expert_input_scale == "layer":
            decided.update(dict.fromkeys(seen, layer))
            raised = tuple(name for name, value in seen.items() if value < layer)
            if raised:
                detail = f"one input scale for all experts of {family.name}, the max over them"
                uses.append(PolicyUse("expert_input_scale=layer", raised, detail))
        elif family.fused:
            detail = f"experts of {family.name} keep their own input scales"
            uses.append(PolicyUse("expert_input_scale=expert", tuple(members), detail))
    if policies.unseen != "weights-only":
        _refuse_unreached(decided, families)
    return decided, uses


def _refuse_own_scales(family: ExpertFamily, some_unseen: bool, policies: Policies) -> None:
    """Raise InputError where a policy would give experts that stay together different input scales."""
    option = "--expert-input-scale expert" if policies.expert_input_scale == "expert" else None
    if some_unseen and policies.unseen == "weights-only":
        option = "--unseen weights-only"
    if family.together and option is not None:
        raise InputError(
            f"{option} would give the experts of {family.name} input scales that differ, and their tensor "
            "has room for one; export without it"
        )


def _refuse_unreached(decided: Mapping[str, Tensor | None], families: Sequence[ExpertFamily]) -> None:
    for family in families:
        if any(name in decided and decided[name] is None for name in family.quantizers):
            raise InputError(
                f"no token of the calibration text reached any expert of {family.name}, so there is no value "
                "to take; calibrate on more text, or export with --unseen weights-only"
            )


def _refuse_unobserved(decided: Mapping[str, Tensor | None], families: Sequence[ExpertFamily]) -> None:
    """Outside expert families nothing may stay without a value."""
    excused = {name for family in families for name in family.quantizers}
    unobserved = tuple(name for name, value in decided.items() if value is None and name not in excused)
    if unobserved:
        raise InputError(
            f"{_shown(unobserved)}: never observed, and neither was its group; calibrate on text that "
            "reaches it, or choose a recipe that leaves it unquantized"
        )


def _shown(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
