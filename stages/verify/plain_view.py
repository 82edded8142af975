"""A checkpoint as it would be without quantization: its tensors and their shapes. No value is read."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from stages.engines.modules import Inventory, Quantized
from state.source import TensorEntry

HALF = "BF16"


def plain_view(tensors: Mapping[str, TensorEntry], inventory: Inventory) -> dict[str, TensorEntry]:
    """Tensor → its shape, with one weight for each quantized module and no scales."""
    beside = {
        entry.name for module in inventory.quantized.values() for entry in module.tensors.values()
    }.union(inventory.kv, inventory.stray)
    found = {name: entry for name, entry in tensors.items() if name not in beside}
    for module in inventory.quantized.values():
        if (shape := _shape(module)) is not None:
            name = module.tensor("weight")
            entry = replace(module.codes, name=name, dtype=HALF, shape=shape, nbytes=2 * prod(shape))
            found[name] = entry
    return dict(sorted(found.items()))


def _shape(module: Quantized) -> tuple[int, ...] | None:
    sizes = module.sizes
    if sizes is None or not module.together:
        return sizes
    return (module.codes.shape[0], *(sizes[::-1] if module.transposed else sizes))
