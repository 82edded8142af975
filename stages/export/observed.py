"""What a run observed for the quantizers of a plan, read from the store into tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.recipe.quantizer_plan import CASTS, QuantizerPlan
from stages.recipe.unified_inputs import input_quantizer
from state.errors import InputError
from state.names import Role, Site
from state.reader import Calibration

KV_ROLES: tuple[Role, Role] = ("k", "v")


@dataclass(frozen=True)
class Observed:
    """Amax values as the run holds them, NaN where nothing was observed, in float32.

    inputs: input quantizer (`<hub module>.input_quantizer`) → `[]` or `[channels]`. kv: K and V quantizer
    (`<hub attention>.k_bmm_quantizer`) → the same. weights: hub module → `[]`.
    """

    inputs: dict[str, Tensor]
    kv: dict[str, Tensor]
    weights: dict[str, Tensor]


def kv_quantizers(attention: str) -> tuple[str, str]:
    """Names of the quantizers of K and V."""
    return f"{attention}.k_bmm_quantizer", f"{attention}.v_bmm_quantizer"


def observed(run: Calibration, quantizers: QuantizerPlan) -> Observed:
    """Statistics of everything the plan quantizes by observation.

    Raises InputError when the run has no such site, or tokens reached one and its amax is NaN all the same.
    """
    inputs = {
        input_quantizer(module): _amax(run, Site(module, "input"))
        for module in quantizers.inputs
        if module not in quantizers.constant_inputs
    }
    kv = {
        name: _amax(run, Site(attention, role))
        for attention, cache in quantizers.kv.items()
        if cache not in CASTS
        for name, role in zip(kv_quantizers(attention), KV_ROLES, strict=True)
    }
    weights = {module: _tensor(run, "weight_amax", Site(module, "weight")) for module in quantizers.weights}
    return Observed(inputs, kv, weights)


def _amax(run: Calibration, site: Site) -> Tensor:
    amax = _tensor(run, "amax", site)
    array, _ = run.layout.locate(site)
    if bool(amax.isnan().all()) and "tokens" in array.statistics and int(run.statistic("tokens", site)) > 0:
        raise InputError(
            f"{site.module}: tokens reached its {site.role} but every amax is NaN, so the activations there "
            "are not finite; calibrate again in a wider dtype or on other data"
        )
    return amax


def _tensor(run: Calibration, statistic: str, site: Site) -> Tensor:
    return torch.tensor(run.statistic(statistic, site), dtype=torch.float32)
