"""The format of a weight, read off modelopt's quantizer; checked against modelopt 0.47."""

from typing import Any

from torch import nn

from stages.formats import TABLE, WeightFormat
from stages.recipe.recipes import Recipe
from stages.recipe.scale_choice import marked, scales_of
from state.errors import InputError


def weight_format_of(
    hub: str, name: str, module: nn.Module, steps: list[Any], recipe: Recipe
) -> WeightFormat:
    """The format that a weight's quantizers put it into.

    Args:
        hub: the weight's module, by the hub's name. name: of the quantizer.
        module: the one that the quantizer belongs to. steps: the quantizers that follow one another.
    Raises InputError for what is in no format of the table.
    """
    from modelopt.torch.export.quant_utils import get_quantization_format

    first, sizes = steps[0], steps[0].block_sizes or {}
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
