"""What layers hand on beside hidden states, as a State: values they return and mappings they share."""

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from stages.calibrate.forward.buffers import HIDDEN, State
from stages.model.decoder import LayerwiseUnsupported


def returned_name(place: int) -> str:
    """Name in a State of what a layer returned at a place of its tuple."""
    return json.dumps([place])


def pack_carried(carried: Mapping[str, Mapping[Any, Any]]) -> State:
    """Tensors of carried mappings by name: the JSON of [argument, key], or [argument, key, place] in a tuple.

    Raises:
        LayerwiseUnsupported: a mapping holds anything but tensors and tuples of them, by string or integer.
    """
    packed: State = {}
    for name, mapping in carried.items():
        for key, value in mapping.items():
            items: dict[tuple[Any, ...], Any] = {(name, key): value}
            if isinstance(value, tuple):
                items = {(name, key, place): item for place, item in enumerate(value)}
            if type(key) not in (str, int) or not all(
                isinstance(item, torch.Tensor) for item in items.values()
            ):
                raise LayerwiseUnsupported(f"{name}[{key!r}] is no tensor and no tuple of tensors")
            packed.update({json.dumps(path): item for path, item in items.items()})
    return packed


def unpack_carried(state: State, carried: Mapping[str, MutableMapping[Any, Any]]) -> None:
    """Fill carried mappings with what `pack_carried` made of them."""
    for packed, value in state.items():
        if packed == HIDDEN:
            continue
        name, *path = json.loads(packed)
        if name in carried:
            key, *place = path
            # Places of a tuple follow one another, as they were packed.
            carried[name][key] = (*carried[name].get(key, ()), value) if place else value
