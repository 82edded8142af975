"""MXFP4 weights that keep their own scales (`--mxfp4-scale cast`) instead of getting new ones by max.

Powers of two are scales of NVFP4 too, so that the same values come out wherever they fit. This is modelopt's
lossless MXFP4 cast (`quantize_mxfp4_to_nvfp4_lossless`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.model.dequantize.source import microscales, powers_of_two
from stages.model.matrices import StoredMatrix
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import Solver
from stages.unify import PolicyUse
from state.errors import InputError
from state.source import Source

POLICY = "mxfp4_scale=cast"


@dataclass(frozen=True)
class Cast:
    """What is kept of each such module: by default of none.

    amax: what takes the place of the weight's own, float32 `[]`. groups: how many groups of values have each
    of the 256 exponents, int64 `[256]`.
    """

    amax: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Mapping[str, Tensor] = field(default_factory=dict)

    def uses(self, quantizers: QuantizerPlan, scales: Mapping[str, Tensor]) -> tuple[PolicyUse, ...]:
        """The policy as it acted, with the groups that do not fit counted. scales: output tensor → float32
        `[]`.
        """
        if not self.amax:
            return ()
        lost, total = 0, 0
        for module, groups in self.groups.items():
            weight = quantizers.weights[module]
            assert weight.tensor_leaf is not None
            tensor_scale = scales[quantizers.output(module, weight.tensor_leaf)]
            fits = weight.holds_powers(_powers(), tensor_scale)
            fits[0] = True  # an exponent of 0 marks groups of zeros
            lost += int(groups[~fits].sum())
            total += int(groups.sum())
        detail = f"scales of the source were kept; {lost:,} of {total:,} groups of 32 values do not fit them"
        return (PolicyUse(POLICY, tuple(f"{module}.weight_quantizer" for module in self.amax), detail),)


def cast_of(
    source: Source, matrices: Mapping[str, StoredMatrix], quantizers: QuantizerPlan, solver: Solver | None
) -> Cast:
    """Read the scales of every quantized weight that the source holds in MXFP4 and whose new format can keep
    them.

    Raises InputError where a solver changes the weights, and where there is nothing to keep.
    """
    recipe = quantizers.recipe.name
    if solver is not None:
        raise InputError(
            f"--mxfp4-scale cast keeps the source's values, which recipe {recipe!r} changes by "
            f"{solver.method}; leave one of both out"
        )
    amax, groups = {}, {}
    for module, weight in quantizers.weights.items():
        exponents = microscales(source, matrices[module])
        if exponents is None:
            continue
        found = exponents.flatten().int().bincount(minlength=256)
        largest = int(found[1:].nonzero().max()) + 1 if bool(found[1:].any()) else 127
        kept = weight.powers_amax(_powers()[largest])
        if kept is not None:
            amax[module], groups[module] = kept, found
    if not amax:
        raise InputError(
            f"--mxfp4-scale cast has nothing to act on: recipe {recipe!r} puts no weight that the source "
            "holds in MXFP4 into NVFP4; leave it out"
        )
    return Cast(amax, groups)


def kept_block_amax(source: Source, matrix: StoredMatrix, weight: WeightFormat) -> Tensor:
    """The amax of every block of a module in `Cast.amax` that gives it its own scale: float32 `[rows,
    blocks]`.
    """
    exponents = microscales(source, matrix)
    assert exponents is not None
    return weight.powers_block_amax(powers_of_two(exponents))


def _powers() -> Tensor:
    """The scale that each exponent stands for."""
    return powers_of_two(torch.arange(256, dtype=torch.uint8))
