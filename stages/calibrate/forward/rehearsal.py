"""Calls of a layer for a copy of it: random hidden states in float32, called as the parent calls the layer.

The calls are those of a short window, captured for this. Where layers hand on more than hidden states (shared
keys and values), they are those of the first batch, with what it had at this layer.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stages.calibrate.forward.buffers import HIDDEN, State
from stages.calibrate.forward.calls import BoundCall, Calls

TOKENS = 256
"""Of the short window: enough for each of many experts to get some."""


@dataclass(frozen=True)
class Rehearsal:
    """A layer's call, to be made by copies of the layer.

    calls, layer, batch: where the call is. beside: its state but for hidden states. shape: of those. returns:
    as `examine` found it.
    """

    calls: Calls
    layer: int
    batch: int
    beside: State
    shape: torch.Size
    returns: int

    def run(self, module: nn.Module) -> State:
        """What a float32 copy of the layer makes of random hidden states, the same each time."""
        device = next(module.parameters()).device
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        state = {HIDDEN: noise, **{name: value.clone() for name, value in self.beside.items()}}
        call = self.calls.bind(self.layer, self.batch, {name: _float(v, device) for name, v in state.items()})
        return _in_float32(call, device).run(module, self.returns)


def _in_float32(call: BoundCall, device: torch.device) -> BoundCall:
    # Mappings that layers fill stay the very ones: the state behind the layer is read from them.
    carried = {id(mapping) for mapping in call.carried.values()}

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _float(value, device)
        if isinstance(value, MutableMapping) and id(value) in carried:
            return value
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(convert(item) for item in value)
        return value

    return replace(
        call,
        args=tuple(convert(value) for value in call.args),
        kwargs={name: convert(value) for name, value in call.kwargs.items()},
    )


def _float(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
