"""Every scale of a checkpoint, decided from what was observed. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.engines.kv import kv_scale_names
from stages.export import scales
from stages.export.observed import Observed, kv_quantizers
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.unified_inputs import unified_inputs
from stages.unify import Policies, PolicyUse, unify

UNIT_SCALE = 1.0
"""The cache scale of recipes that fix it (`*_cast`); written out, since engines warn about a missing one."""


@dataclass(frozen=True)
class Decisions:
    """What a checkpoint stores beside its weights.

    scales: output tensor → float32 `[]`. weights_only: modules without an input scale. uses: every policy
    that acted.
    """

    scales: dict[str, Tensor]
    weights_only: frozenset[str]
    uses: tuple[PolicyUse, ...]


def decide(
    found: Observed,
    quantizers: QuantizerPlan,
    same_input: Sequence[Sequence[str]],
    engine_fused: Sequence[Sequence[str]],
    policies: Policies,
) -> Decisions:
    """Unify, reduce and scale. Groups are of hub modules.

    Raises InputError as `unify` and `share_weight_amax` do.
    """
    weights = scales.share_weight_amax(
        found.weights,
        quantizers.weights,
        same_input,
        engine_fused,
        quantizers.fused_experts,
        policies.dead,
        quantizers.together | quantizers.merged,
    )
    inputs, input_uses = unified_inputs(found.inputs, quantizers, same_input, engine_fused, policies)
    kv = unify(found.kv, policies=policies)
    result: dict[str, Tensor] = {}
    weights_only = set()
    for module in quantizers.inputs:
        amax = inputs.get(module)
        if amax is None:
            weights_only.add(module)
        else:
            result[quantizers.output(module, "input_scale")] = quantizers.weights[module].input_scale(amax)
    for quantizer, amax in weights.amax.items():
        assert amax is not None, quantizer
        module = quantizer.removesuffix(".weight_quantizer")
        weight_format = quantizers.weights[module]
        assert weight_format.tensor_leaf is not None
        result[quantizers.output(module, weight_format.tensor_leaf)] = weight_format.tensor_scale(amax)
    for attention in quantizers.kv:
        for name, quantizer in zip(kv_scale_names(attention), kv_quantizers(attention), strict=True):
            amax = kv.amax.get(quantizer)
            result[name] = torch.tensor(UNIT_SCALE) if amax is None else scales.kv_scale(amax)
    return Decisions(result, frozenset(weights_only), (*input_uses, *weights.uses, *kv.uses))
