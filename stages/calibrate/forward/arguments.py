"""What the parent model hands to each decoder layer beside the hidden state: masks, rotary embeddings.

Found by running the parent with stand-ins in place of its layers, which record their arguments and hand the
hidden state on. Nothing of a layer is computed, so the capture needs only the weights outside the layers.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.calibrate.forward.calls import Carried, Comparison, Hidden, LayerCall, Leaf, Returned, differing
from stages.calibrate.observe.lm_head import without_logits
from stages.model.decoder import Decoder, LayerwiseUnsupported

MOST_RETURNS = 3
"""The longest tuple that decoder layers are known to return."""


@dataclass(frozen=True)
class Capture:
    """One forward of the parent: the hidden state that enters layer 0, and the call of every layer."""

    hidden: torch.Tensor
    calls: tuple[LayerCall, ...]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor in it, once."""
        every = [self.hidden, *(leaf for call in self.calls for leaf in call.leaves)]
        return list({id(value): value for value in every if isinstance(value, torch.Tensor)}.values())

    def entering(self) -> torch.Tensor:
        """The hidden state for layer 0 to work on: a copy where layers are handed it as an argument too."""
        passed_on = any(leaf is self.hidden for call in self.calls for leaf in call.leaves)
        return self.hidden.clone() if passed_on else self.hidden


def examine(decoder: Decoder, tokens: torch.Tensor) -> tuple[int, Capture]:
    """Find with one batch of token ids [batch, seq] how the parent calls its layers. Returns how many values
    it takes from each layer (0 for a bare tensor, else the length of the tuple), and the batch's capture.

    Raises:
        LayerwiseUnsupported: the parent changes the hidden state between layers, calls the layers in another
            order than stored, or hands them something that can't be replayed.
    """
    reasons = []
    try:
        for returns in range(MOST_RETURNS + 1):
            try:
                return returns, capture_arguments(decoder, tokens, returns)
            except LayerwiseUnsupported as reason:
                reasons.append(reason)
        raise reasons[0]
    finally:
        reasons.clear()  # their frames hold hidden states, and this one


def require_independence(
    decoder: Decoder, tokens: torch.Tensor, returns: int, taken: tuple[LayerCall, ...]
) -> None:
    """Check that the arguments of layers are the same where a layer hands on another hidden state.

    Stand-ins hand on the embedding: an argument computed from hidden states would be wrong in a replay, and
    shows it only under another hidden state. taken, returns: calls and number of values that `examine` found
    for these tokens.

    Raises:
        LayerwiseUnsupported: they are computed from hidden states.
    """
    altered = capture_arguments(decoder, tokens, returns, altered=True).calls
    equal = Comparison(taken, altered)
    for layer, calls in enumerate(zip(taken, altered, strict=True)):
        if differing(*calls, equal):
            raise LayerwiseUnsupported(
                f"{decoder.model_name} computes arguments of {decoder.name(layer)} from hidden states"
            )


def capture_arguments(decoder: Decoder, tokens: torch.Tensor, returns: int, altered: bool = False) -> Capture:
    """Record the calls of all layers for a batch of token ids [batch, seq]; raises as `examine` does.

    altered: have layer 0 hand on another hidden state than it was given.
    """
    stand_ins = _StandIns(decoder, returns)
    if altered:
        stand_ins.outputs[0] = lambda hidden: hidden * 0.5 + 1
    with stand_ins.installed(), without_logits(decoder.model), versions_counted():
        try:
            decoder.model(input_ids=tokens, use_cache=False)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise LayerwiseUnsupported(
                f"{decoder.model_name} takes something else from its layers than hidden states ({error})"
            ) from error
    if len(stand_ins.calls) != len(decoder.layers):
        raise LayerwiseUnsupported(
            f"{decoder.model_name} called {len(stand_ins.calls)} of its {len(decoder.layers)} layers"
        )
    return Capture(stand_ins.handed[0], tuple(stand_ins.calls))


def finish(
    decoder: Decoder,
    tokens: torch.Tensor,
    output: Callable[[], torch.Tensor],
    returns: int,
    logits: bool = False,
) -> None:
    """The parent's forward around its layers, for hooks to see: its modules get what they get in the whole
    model's forward, up to the output head's input.

    output: called where the last layer would be; what it returns is the parent's own to change. logits: the
    output head is computed too.
    """
    stand_ins = _StandIns(decoder, returns, recording=False)
    stand_ins.outputs[len(decoder.layers) - 1] = lambda _: output()
    head = nullcontext() if logits else without_logits(decoder.model)
    with stand_ins.installed(), head, versions_counted():
        decoder.model(input_ids=tokens, use_cache=False)


@contextmanager
def versions_counted() -> Iterator[None]:
    """No gradients, but not inference mode: its tensors have no version counter, by which changes in place
    are noticed.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class _Extra:
    """What a stand-in returns for a value beside the hidden state."""

    layer: int
    place: int


def _whole(hidden: torch.Tensor, handed: torch.Tensor) -> bool:
    """Whether a hidden state is the very one that a layer handed on, or a view of it that leaves nothing out:
    Gemma 4 slices it to the tokens whose logits are asked for, which may be all."""
    return hidden is handed or (hidden._base is handed and hidden.is_set_to(handed))


class _NotReplayable(Exception):
    """An argument that a replay can't give; says why."""


class _StandIns:
    """The recording shared by the stand-ins of one forward.

    recording: whether `calls` is filled. outputs: layers that hand on something else than the hidden state
    they were given, as functions of it.
    """

    def __init__(self, decoder: Decoder, returns: int, recording: bool = True) -> None:
        self.decoder = decoder
        self.returns = returns
        self.recording = recording
        self.outputs: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.calls: list[LayerCall] = []
        self.entered = 0
        # The hidden state that entered layer 0, then each stand-in's result.
        self.handed: list[torch.Tensor] = []
        self.version = 0
        # Empty mappings that layers are given to fill, by argument.
        self.shared: dict[str, MutableMapping[Any, Any]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the stand-ins in place of the layers."""
        layers = list(self.decoder.layers)
        for index, layer in enumerate(layers):
            self.decoder.layers[index] = _StandIn(self, index, layer)
        try:
            yield
        finally:
            for index, layer in enumerate(layers):
                self.decoder.layers[index] = layer

    def called(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of layer `index` and return the hidden state, in a tuple where layers do."""
        if index != self.entered:
            raise LayerwiseUnsupported(
                f"{self.decoder.name(index)} is called when {self.decoder.name(self.entered)} should be"
            )
        self.entered += 1
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise LayerwiseUnsupported(f"{self.decoder.name(index)} is not called with a hidden state first")
        if index == 0:
            self.handed.append(hidden)
        elif not _whole(hidden, self.handed[-1]) or hidden._version != self.version:
            raise LayerwiseUnsupported(
                f"{self.decoder.model_name} changes the hidden state "
                f"between {self.decoder.name(index - 1)} and {self.decoder.name(index)}"
            )
        if self.recording:
            self.calls.append(self._call(index, hidden, args, kwargs))
        # Each result is a tensor of its own, though of the same memory, to be told from those before it.
        result = self.outputs.get(index, torch.Tensor.detach)(hidden)
        self.handed.append(result)
        self.version = result._version
        if not self.returns:
            return result
        return (result, *(_Extra(index, place) for place in range(1, self.returns)))

    def _call(
        self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerCall:
        leaves: list[Any] = []

        def argument(value: Any, name: str) -> Any:
            match value:
                case _Extra(layer, place) if layer == index - 1:
                    return Returned(place)
                case MutableMapping() if not value and value is self.shared.setdefault(name, value):
                    return Carried(name, type(value))
            try:
                return self._template(value, hidden, leaves)
            except _NotReplayable as reason:
                raise LayerwiseUnsupported(
                    f"argument {name} of {self.decoder.name(index)} {reason}"
                ) from None

        positional = tuple(argument(value, f"{place}") for place, value in enumerate(args))
        named = {name: argument(value, name) for name, value in kwargs.items()}
        return LayerCall((positional, named), tuple(leaves))

    def _template(self, value: Any, hidden: torch.Tensor, leaves: list[Any]) -> Any:
        """What stands for an argument in a template; its leaves are appended to `leaves`."""
        if value is hidden:
            return Hidden()
        if isinstance(value, torch.Tensor) and any(value is earlier for earlier in self.handed[1:]):
            raise _NotReplayable("is an earlier layer's output")
        match value:
            case dict():
                return {key: self._template(item, hidden, leaves) for key, item in value.items()}
            case list() | tuple():
                return type(value)(self._template(item, hidden, leaves) for item in value)
            case None | torch.Tensor() | bool() | int() | float() | str():
                leaves.append(value)
                return Leaf(len(leaves) - 1)
        raise _NotReplayable(f"can't be replayed: a {type(value).__name__}")


class _StandIn(nn.Module):
    """Takes the place of a decoder layer; whatever its parent reads from it is the layer's own."""

    def __init__(self, stand_ins: _StandIns, index: int, layer: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own bookkeeping: the layer must not become a submodule here.
        self.__dict__.update(_stand_ins=stand_ins, _index=index, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call."""
        return self._stand_ins.called(self._index, args, kwargs)
