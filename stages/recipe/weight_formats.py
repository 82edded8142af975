"""The format of a weight, read off modelopt's quantizer; checked against modelopt 0.47."""

from typing import Any

import torch
from torch import nn

from stages.formats import TABLE, WeightFormat
from stages.formats.grids import E2M1_MAX, E4M3_MAX
from stages.recipe.recipes import Recipe
from stages.recipe.scale_choice import marked, scales_of
from state.errors import InputError

LARGEST: dict[Any, float] = {(2, 1): E2M1_MAX, (4, 3): E4M3_MAX, 8: 127.0}
"""modelopt's `num_bits` → the largest magnitude."""


def weight_format_of(hub: str, name: str, quantizer: Any, inputs: Any, recipe: Recipe) -> WeightFormat:
    """The format that a weight's quantizer puts it into.

    Args:
        hub: the weight's module, by the hub's name. name: of the quantizer.
        inputs: the quantizer of the inputs.
    Raises InputError for what is in no format of the table.
    """
    from modelopt.torch.export.quant_utils import get_quantization_format

    # As modelopt's exporter has it for a projection of experts: a module of one weight.
    module = nn.Module()
    module.weight, module.weight_quantizer = nn.Parameter(torch.empty(0)), quantizer
    module.input_quantizer = inputs
    first = in_sequence(quantizer)[0]
    sizes = first.block_sizes or {}
    try:
        stored = get_quantization_format(module)
    except NotImplementedError:  # modelopt can fake-quantize it, but has no checkpoint format for it
        stored = f"num_bits={first.num_bits}"
    found = TABLE.get(stored)
    if found is not None:
        wrong = _unlike(found, first.axis, sizes, recipe)
        if wrong is not None:
            stored, found = f"{stored} with {wrong}", None
    if found is None:
        raise InputError(
            f"recipe {recipe.name!r} quantizes {hub} to {stored!r} ({name}), "
            f"which is not supported yet; supported: {', '.join(TABLE)}"
        )
    return found.with_blocks(sizes.get(-1, 0))


def takes_inputs(weight: WeightFormat, quantizer: Any) -> bool:
    """Whether the inputs beside a weight of this format may be quantized so: on the same grid, and with their
    scales stored or found as the format has it. NVFP4's are found but for the one that is stored.
    """
    found = bool(quantizer._dynamic or quantizer.is_mx_format)
    bound = LARGEST.get(quantizer.num_bits, 0.0)
    if weight.inputs != ("found" if found else "stored"):
        return False
    return weight.input_bound in (bound, bound * E4M3_MAX)


def in_sequence(quantizer: Any) -> list[Any]:
    """The quantizers that follow one another in modelopt's SequentialQuantizer; a plain one alone."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def _unlike(found: WeightFormat, axis: Any, sizes: dict[Any, Any], recipe: Recipe) -> str | None:
    """The attribute of a quantizer that the format does not have."""
    if found.weight_axis not in (None, axis):
        return f"axis={axis}"
    if sizes.get(-2) != (sizes[-1] if found.square else None):
        return f"block_sizes={sizes}"
    if found.with_scales("mse") is None:
        return None
    scales = scales_of(recipe)
    if marked(sizes) != (scales == "four_over_six"):
        return f"four_over_six={marked(sizes)} and scales by {scales}"
    if scales != "max" and sizes.get("type") == "dynamic":
        return f"type='dynamic', of which modelopt searches no scales of blocks ({scales})"
    return None
