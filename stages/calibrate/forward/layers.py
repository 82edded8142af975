"""The forward of a model with one decoder layer in memory at a time: all batches through it, then the next.

Weights of the next layer are read while this one computes. Outputs are bit-equal to the whole model's, since
each layer is called as its parent calls it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from stages.calibrate.forward.arguments import (
    Capture,
    capture_arguments,
    examine,
    finish,
    require_independence,
)
from stages.calibrate.forward.beside import Beside
from stages.calibrate.forward.buffers import HIDDEN, Limits, State
from stages.calibrate.forward.calls import Calls, LayerCall
from stages.calibrate.forward.hidden import ARGUMENTS_FOLDER, HIDDEN_FOLDER, HiddenStates
from stages.calibrate.forward.kept import Circumstances
from stages.calibrate.forward.layer_weights import HEAD, OUTSIDE, Weights, materialise_buffers
from stages.calibrate.forward.rehearsal import TOKENS, Rehearsal
from stages.model.decoder import find_decoder
from stages.model.skeleton import Skeleton
from state.source import Source

Observe = Callable[[int, nn.Module], AbstractContextManager[object]]
Advance = Callable[[int, int], None]
Outside = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class LayerStep:
    """A decoder layer that all batches have gone through; its weights stay until the next step is taken.

    rehearsal: how copies of it are called, where that was asked for.
    """

    layer: int
    name: str
    module: nn.Module
    states: HiddenStates
    rehearsal: Rehearsal | None

    def seal(self) -> None:
        """Keep what is behind this layer for the next process to go on from: see `HiddenStates.seal`."""
        self.states.seal()


class LayerwiseForward:
    """One forward of all windows: within a `with`, call `start`, then go through `steps`.

    What the parent model does before the first layer and behind the last is done batch by batch beside these
    layers, so that a GPU is not kept waiting for it. When the `with` ends, files of hidden states are
    deleted; when an exception ends it, they stay to go on.

    Args:
        skeleton: the model on the meta device; its buffers are materialised here, its layers loaded in turn.
        source: the checkpoint it was built for.
        tokens: int [windows, seq].
        batch: windows per forward.
        folder: for what doesn't fit `limits`; its files are deleted, save the one that `start` goes on from.
        circumstances, say: see `HiddenStates`.
        advance: called with (layer, batch) after each batch, for progress; what it raises ends the forward.
        outside: entered around the forward of what surrounds the layers, once per batch as the last layer
        runs; hooks see there what they see in the whole model's forward. On a GPU it goes on the stream
        beside (`Beside`), which is joined before the layer is yielded. Without it there is no such forward.
        rehearsing: copies of layers will be run, for which a short window's calls are captured too.

    Raises:
        LayerwiseUnsupported: the model can't be run this way (here and in all methods).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: Source,
        tokens: torch.Tensor,
        batch: int,
        device: torch.device,
        folder: Path,
        limits: Limits,
        advance: Advance = lambda layer, batch: None,
        outside: Outside | None = None,
        circumstances: Circumstances = MappingProxyType({}),
        say: Callable[[str], None] = lambda message: None,
        rehearsing: bool = False,
    ) -> None:
        materialise_buffers(skeleton.model, device)
        self.decoder = find_decoder(skeleton.model)
        self._weights = Weights(self.decoder, skeleton.parameter_of, source, device)
        # All at once: a copy to a GPU waits for everything that was queued before it.
        self._batches = tokens.to(device, torch.int64).split(batch)
        self._states = HiddenStates(
            folder / HIDDEN_FOLDER, len(self._batches), device, limits, circumstances, say
        )
        self._beside = Beside(device)
        self._calls = Calls(folder / ARGUMENTS_FOLDER, len(self._batches), device, limits, self._beside)
        self._short = Calls(folder / ARGUMENTS_FOLDER, 1, device, limits, self._beside)
        self._short_shape: torch.Size | None = None
        self._rehearsing = rehearsing
        self._beside_first: State = {}
        self._first_shape = torch.Size()
        self._advance = advance
        self._outside = outside
        self._returns = 0
        self._examined: Capture | None = None
        self._unchecked: tuple[LayerCall, ...] = ()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-weights")

    def __enter__(self) -> "LayerwiseForward":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._calls.close()
        self._short.close()
        if kind is None:
            self._states.close()

    def start(self, layer: int = 0) -> int:
        """Find with the first batch how the layers are called, and go on from what an earlier process kept of
        the hidden states before `layer`, or before an earlier one. Returns the first layer that is yet to
        run."""
        self._states.restore(layer)
        self._load_outside()
        self._beside.follow()  # weights that were loaded before may still be on their way
        with self._beside.run():
            self._returns, self._examined = examine(self.decoder, self._batches[0])
        if self._rehearsing:
            self._capture_short()
        return self._states.layer

    def _capture_short(self) -> None:
        tokens = self._batches[0][:1, :TOKENS]
        with self._beside.run():
            short = capture_arguments(self.decoder, tokens, self._returns)
            self._short.add(0, tokens.shape, short.calls)
        self._short_shape = short.hidden.shape
        self._beside.join(short.tensors())

    def steps(
        self, observe: Observe = lambda layer, module: nullcontext(), first: int = 0
    ) -> Iterator[LayerStep]:
        """Run the layers that are left, and yield those from `first` on, each while its weights are still
        loaded.

        observe: entered with (layer, module) around all batches of each layer that is yielded. Layers before
        `first` are only run: that recomputes the hidden states behind the last committed layer.
        """
        entry, last = self._states.layer, len(self.decoder.layers) - 1
        for layer in self._loaded(range(entry, last + 1)):
            module = self.decoder.layers[layer]
            outside = self._outside if layer == last else None
            if outside is not None:
                self._load_outside()
            with observe(layer, module) if layer >= first else nullcontext():
                self._run(layer, module, layer == entry, outside)
            self._beside.join()
            self._weights.free(OUTSIDE)
            if layer >= first:
                rehearsal = self._rehearsal(layer)
                yield LayerStep(layer, self.decoder.name(layer), module, self._states, rehearsal)
            self._calls.drop(layer)
            self._states.turn()

    def logits(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the parent makes of the hidden state behind the last layer, once all layers have run:
        `[windows, seq, vocabulary]`.
        """
        self._load_outside()
        self._load_head()
        found = []
        hook = self.decoder.model.register_forward_hook(lambda _module, _args, out: found.append(out.logits))
        try:
            with self._beside.run():
                finish(self.decoder, self._batches[batch], hidden.clone, self._returns, logits=True)
        finally:
            hook.remove()
        self._beside.join(found)
        return found[0]

    def _load_head(self) -> None:
        """Load the output head, or give it the embedding that it is tied to."""
        if self._weights.absent(HEAD):
            self._weights.load(HEAD, self._weights.read(HEAD))
            self._beside.follow()
        model = self.decoder.model
        head = model.get_output_embeddings()
        if head.weight.is_meta:
            head.weight = model.get_input_embeddings().weight

    def _rehearsal(self, layer: int) -> Rehearsal | None:
        """With the short window, where hidden states alone are handed on; else with the first batch."""
        if not self._rehearsing:
            return None
        if self._short_shape is not None and not self._beside_first:
            return Rehearsal(self._short, layer, 0, {}, self._short_shape, self._returns)
        return Rehearsal(self._calls, layer, 0, self._beside_first, self._first_shape, self._returns)

    def _loaded(self, layers: range) -> Iterator[int]:
        """Each layer while it has its weights; those of the next are read meanwhile."""
        upcoming: Future[dict[str, torch.Tensor]] | None = None
        for layer in layers:
            read = upcoming or self._start_reading(layer)
            if read is not None:
                self._weights.load(layer, read.result())
            upcoming = self._start_reading(layer + 1) if layer + 1 in layers else None
            yield layer
            self._weights.free(layer)

    def _load_outside(self) -> None:
        """Load what surrounds the layers, unless it is loaded."""
        if self._weights.absent(OUTSIDE):
            self._weights.load(OUTSIDE, self._weights.read(OUTSIDE))
            self._beside.follow()

    def _start_reading(self, layer: int) -> Future[dict[str, torch.Tensor]] | None:
        """A layer's weights, read in the background; None where they are loaded."""
        return self._reader.submit(self._weights.read, layer) if self._weights.absent(layer) else None

    @torch.inference_mode()
    def _run(self, layer: int, module: nn.Module, entering: bool, outside: Outside | None) -> None:
        """All batches through a layer. entering: it is the first to run. outside: as in
        `LayerwiseForward`."""
        for batch in range(len(self._batches)):
            state = self._enter(layer, batch) if entering else self._states.read(batch)
            if batch == 0 and self._rehearsing:
                self._first_shape = state[HIDDEN].shape
                self._beside_first = {name: value.clone() for name, value in state.items() if name != HIDDEN}
            state = self._calls.bind(layer, batch, state).run(module, self._returns)
            if entering and batch == min(1, len(self._batches) - 1):
                self._check()  # behind the batches that it is about: a GPU has them to compute meanwhile
            if layer + 1 < len(self.decoder.layers):
                self._states.write(batch, state)
            if outside is not None:
                self._finish(batch, state[HIDDEN], outside)
            self._advance(layer, batch)

    def _enter(self, layer: int, batch: int) -> State:
        """Record what the parent hands to every layer for a batch. Returns the state before `layer`."""
        taken, self._examined = self._examined, None
        if taken is None:
            # For the second batch layer 0 hands on another hidden state than it was given: arguments that
            # come out as the first batch's are not computed from it, which saves `_check` a capture.
            with self._beside.run():
                tokens = self._batches[batch]
                taken = capture_arguments(self.decoder, tokens, self._returns, altered=batch == 1)
        self._beside.join(taken.tensors())
        equal = self._calls.add(batch, self._batches[batch].shape, taken.calls)
        if batch == 0:
            self._unchecked = taken.calls
        elif batch == 1 and equal:
            self._unchecked = ()
        return self._states.read(batch) if layer else {HIDDEN: taken.entering()}

    def _check(self) -> None:
        """Check that the recorded arguments hold for every hidden state, unless the second batch showed
        it."""
        if self._unchecked:
            with self._beside.run():
                require_independence(self.decoder, self._batches[0], self._returns, self._unchecked)
            self._unchecked = ()

    def _finish(self, batch: int, hidden: torch.Tensor, outside: Outside) -> None:
        """The parent's forward of a batch around its layers, `hidden` being the output of the last."""

        def output() -> torch.Tensor:
            self._beside.follow([hidden])
            return hidden.clone()

        with self._beside.run(), outside():
            finish(self.decoder, self._batches[batch], output, self._returns)
