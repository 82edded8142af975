"""The one amax of each input quantizer of a recipe, from what was observed. Pure.

Export writes scales that come from it, and solvers that see inputs as engines round them use the same.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import INPUT_POLICIES, stacked_name
from stages.unify import ExpertFamily, Policies, PolicyUse, unify
from state.names import split_name

Groups = Sequence[Sequence[str]]
"""Hub modules that belong together."""


def input_quantizer(module: str) -> str:
    """Name of a module's input quantizer in hub names, as reports show it."""
    return f"{module}.input_quantizer"


def expert_families(modules: Iterable[str]) -> dict[str, list[str]]:
    """The experts of each layer by projection: `model.layers.3.mlp.experts.E.up_proj` → modules, in order.

    Modules that belong to no numbered expert are left out.
    """
    families: dict[str, dict[int, str]] = {}
    for module in modules:
        expert = split_name(module)[2]
        if expert is not None:
            families.setdefault(stacked_name(module), {})[expert] = module
    return {name: [members[expert] for expert in sorted(members)] for name, members in families.items()}


def unified_inputs(
    observed: Mapping[str, Tensor],
    quantizers: QuantizerPlan,
    same_input: Groups,
    engine_fused: Groups,
    policies: Policies,
) -> tuple[dict[str, Tensor | None], tuple[PolicyUse, ...]]:
    """Module whose inputs the plan quantizes → amax, float32 `[]`; None where a policy leaves it out. And
    every policy that acted.

    Args:
        observed: input quantizer → amax, `[]` or `[channels]`, NaN where nothing was observed. Those that are
            not in it are left out, but for those whose amax the recipe fixes.
    Raises InputError as `unify` does.
    """
    found = unify(
        observed,
        [[input_quantizer(module) for module in group] for group in same_input],
        [[input_quantizer(module) for module in group] for group in engine_fused],
        _families(quantizers),
        policies,
    )
    result: dict[str, Tensor | None] = {}
    for module in quantizers.inputs:
        if module in quantizers.constant_inputs:
            result[module] = torch.tensor(quantizers.constant_inputs[module], dtype=torch.float32)
        elif input_quantizer(module) in found.amax:
            result[module] = found.amax[input_quantizer(module)]
    return result, found.uses


def solver_inputs(
    observed: Mapping[str, Tensor], quantizers: QuantizerPlan, same_input: Groups, engine_fused: Groups
) -> dict[str, Tensor | None]:
    """`unified_inputs` as solvers that see rounded inputs take them: under `INPUT_POLICIES`, and without the
    modules that nothing is known of, whose inputs stay as they are: never observed, and in a layer of experts
    none of which was.
    """
    unseen = {name for name, amax in observed.items() if bool(amax.isnan().all())}
    families = [
        {input_quantizer(module) for module in members}
        for members in expert_families(quantizers.inputs).values()
    ]
    of_experts = set().union(*families)
    unknown = (unseen - of_experts).union(*(family for family in families if family <= unseen))
    known = {name: amax for name, amax in observed.items() if name not in unknown}
    return unified_inputs(known, quantizers, same_input, engine_fused, INPUT_POLICIES)[0]


def _families(quantizers: QuantizerPlan) -> list[ExpertFamily]:
    return [
        ExpertFamily(
            name,
            tuple(input_quantizer(module) for module in members),
            members[0] in quantizers.fused_experts,
            members[0] in quantizers.together,
        )
        for name, members in expert_families(quantizers.inputs).items()
    ]
