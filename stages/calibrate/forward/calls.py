"""Recorded calls of decoder layers, and how to make them again for every batch.

Most arguments (masks, rotary embeddings) are equal for all batches of a shape and kept once. Those that
differ (Gemma 4's per-layer inputs) are kept per batch. State that layers hand on through a shared mapping is
filled in and taken out again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stages.calibrate.forward.beside import Beside
from stages.calibrate.forward.buffers import HIDDEN, Buffer, Limits, State, open_buffer
from stages.calibrate.forward.carried import pack_carried, returned_name, unpack_carried
from stages.model.decoder import LayerwiseUnsupported

Layer = Callable[..., Any]  # a decoder layer, or what is called in its place


@dataclass(frozen=True)
class Leaf:
    """Stands in a template for the leaf (tensor, number, None) of this index."""

    index: int


@dataclass(frozen=True)
class Hidden:
    """Stands in a template for the hidden state."""


@dataclass(frozen=True)
class Carried:
    """Stands in a template for a mapping of type `kind` through which layers hand state to later layers
    (Gemma's `shared_kv_states`). `name`: the argument it comes in."""

    name: str
    kind: type


@dataclass(frozen=True)
class Returned:
    """Stands in a template for what the layer before returned at this place of its tuple (GLM's top-k
    indices)."""

    place: int


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: `template` is (args, kwargs) with Leaf, Hidden, Carried and Returned in it."""

    template: Any
    leaves: tuple[Any, ...]

    def carried(self) -> dict[str, type]:
        """Name and type of each mapping that carries state from layer to layer."""
        return {value.name: value.kind for value in self._arguments() if isinstance(value, Carried)}

    def returned(self) -> set[int]:
        """Places of the values that the layer before must return for this call."""
        return {value.place for value in self._arguments() if isinstance(value, Returned)}

    def _arguments(self) -> tuple[Any, ...]:
        args, kwargs = self.template
        return (*args, *kwargs.values())

    def fill(self, replace: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), with `replace` called for everything that stands in the template."""
        args, kwargs = self.template
        return _filled(args, replace), _filled(kwargs, replace)


# A function of its own: one within `fill` that calls itself would keep what `replace` holds, a hidden state,
# until the garbage collector comes by.
def _filled(value: Any, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, replace) for item in value)
    return replace(value)


def differing(
    call: LayerCall, other: LayerCall, equal: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal
) -> list[int]:
    """Indices of the tensor leaves with other values in `other`.

    Args:
        equal: compares two leaves; a `Comparison` where the calls of many layers hold the same tensors.

    Raises:
        LayerwiseUnsupported: the calls differ in anything else.
    """
    if call.template != other.template:
        raise LayerwiseUnsupported("a layer's arguments change their structure from batch to batch")
    found = []
    for index, (left, right) in enumerate(zip(call.leaves, other.leaves, strict=True)):
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            if not equal(left, right):
                found.append(index)
        elif isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor) or left != right:
            raise LayerwiseUnsupported(
                f"a layer's argument is {_described(left)} in one batch and {_described(right)} in another"
            )
    return found


class Comparison:
    """`torch.equal` for the leaves of two lists of calls. Layers are handed the same masks and rotary
    embeddings, and a GPU is waited for at every look: each pair is compared once, and all are looked at
    together.
    """

    def __init__(self, calls: Iterable[LayerCall], others: Iterable[LayerCall]) -> None:
        # Kept, so that identities stay unique.
        self._pairs = {
            (id(left), id(right)): (left, right)
            for call, other in zip(calls, others, strict=True)
            for left, right in zip(call.leaves, other.leaves, strict=False)
            if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
        }
        self._equal = dict(zip(self._pairs, _equal(list(self._pairs.values())), strict=True))

    def __call__(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Whether both hold the same values."""
        return self._equal[id(left), id(right)]


def _equal(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[bool]:
    """Whether the tensors of each pair are the same, with one look per device."""
    equal = [left is right for left, right in pairs]
    compared: dict[torch.device, dict[int, torch.Tensor]] = defaultdict(dict)
    for index, (left, right) in enumerate(pairs):
        alike = (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
        if alike and left is not right:
            compared[left.device][index] = (left == right).all()
    for found in compared.values():
        for index, value in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            equal[index] = value
    return equal


class Calls:
    """The calls of all layers for all batches.

    Args:
        folder: for arguments that differ from batch to batch and don't fit in memory.
        batches: how many there are.
        beside: where the calls were captured.
    """

    def __init__(
        self, folder: Path, batches: int, device: torch.device, limits: Limits, beside: Beside
    ) -> None:
        self._folder = folder
        self._batches = batches
        self._device = device
        self._limits = limits
        self._beside = beside
        self._shape_of: dict[int, torch.Size] = {}
        self._calls: dict[torch.Size, tuple[LayerCall, ...]] = {}
        self._own: dict[int, Buffer] = {}
        self._has_own: set[tuple[int, int]] = set()

    def add(self, batch: int, shape: torch.Size, calls: tuple[LayerCall, ...]) -> bool:
        """Keep what the parent handed to each layer for a batch of tokens of this shape. Returns whether the
        first batch of the shape, an earlier one, was handed the same.

        Raises:
            LayerwiseUnsupported: the calls are built otherwise than those of an earlier batch of this shape.
        """
        self._shape_of[batch] = shape
        kept = self._calls.setdefault(shape, calls)
        with self._beside.run():
            equal = Comparison(kept, calls)
        same = kept is not calls
        for layer, (call, other) in enumerate(zip(kept, calls, strict=True)):
            own = {str(index): other.leaves[index] for index in differing(call, other, equal)}
            if own:
                self._buffer(layer, len(calls), own).write(batch, own)
                self._has_own.add((layer, batch))
                same = False
        return same

    def _buffer(self, layer: int, layers: int, own: State) -> Buffer:
        if layer not in self._own:
            needed = layers * self._batches * sum(value.nbytes for value in own.values())
            path = self._folder / f"{layer:06d}.raw"
            self._own[layer] = open_buffer(path, self._device, needed, self._limits)
        return self._own[layer]

    def bind(self, layer: int, batch: int, state: State, last: bool = True) -> "BoundCall":
        """The call of a layer for a batch whose state is given. last: it is not made again."""
        calls = self._calls[self._shape_of[batch]]
        call = calls[layer]
        unpack_carried(state, carried := {name: kind() for name, kind in call.carried().items()})
        buffer = self._own[layer] if (layer, batch) in self._has_own else None
        own = {} if buffer is None else buffer.read(batch) if last else buffer.peek(batch)

        def given(value: Any) -> Any:
            match value:
                case Hidden():
                    return state[HIDDEN]
                case Leaf(index):
                    return own.get(str(index), call.leaves[index])
                case Carried(name, _):
                    return carried[name]
                case Returned(place):
                    return state.get(returned_name(place))

        args, kwargs = call.fill(given)
        wanted = calls[layer + 1].returned() if layer + 1 < len(calls) else set()
        return BoundCall(args, kwargs, carried, wanted)

    def drop(self, layer: int) -> None:
        """Let go of a layer's per-batch arguments."""
        if layer in self._own:
            self._own.pop(layer).drop()

    def close(self) -> None:
        """Let go of everything."""
        for layer in list(self._own):
            self.drop(layer)
        self._calls.clear()


@dataclass(frozen=True)
class BoundCall:
    """A layer's call with everything filled in.

    carried: the mappings among the arguments, which the layer may change. wanted: places of the values beside
    the hidden state that the next layer needs of this one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    carried: dict[str, MutableMapping[Any, Any]]
    wanted: set[int]

    def copied(self) -> "BoundCall":
        """The same with copies of the tensors that were made in inference mode: autograd keeps no such."""
        args, kwargs = _filled(self.args, _copy_inference), _filled(self.kwargs, _copy_inference)
        return replace(self, args=args, kwargs=kwargs)

    def run(self, module: Layer, returns: int) -> State:
        """The state after the layer. returns: what `examine` found the parent to take from each layer.

        Raises:
            LayerwiseUnsupported: the layer returns something else.
        """
        output = module(*self.args, **self.kwargs)
        values = output if isinstance(output, tuple) else (output,)
        if isinstance(output, tuple) != bool(returns) or not isinstance(values[0], torch.Tensor):
            raise LayerwiseUnsupported(f"{type(module).__name__} returns a {type(output).__name__}")
        more = {returned_name(place): values[place] for place in self.wanted if values[place] is not None}
        return {HIDDEN: values[0], **more, **pack_carried(self.carried)}


def _copy_inference(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _described(value: Any) -> str:
    """An argument for a message: of a tensor no values."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return repr(value)
