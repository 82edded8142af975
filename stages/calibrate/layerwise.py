"""The forward of a model with one decoder layer in memory at a time: all batches through it, then the next.

Weights of the next layer are read while this one computes. Outputs are bit-equal to the whole model's, since
each layer is called as its parent calls it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stages.calibrate.arguments import capture, examine, finish
from stages.calibrate.calls import Calls
from stages.calibrate.decoder import find_decoder
from stages.calibrate.hidden import HIDDEN, Boundary, HiddenStates, Limits
from stages.calibrate.weights import OUTSIDE, Weights, materialise_buffers
from stages.skeleton import Skeleton
from state.source import Source

Observe = Callable[[int, nn.Module], AbstractContextManager[object]]
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Step:
    """A decoder layer that all batches have gone through; its weights stay until the next step is taken."""

    layer: int
    name: str
    module: nn.Module
    states: HiddenStates

    def seal(self) -> Boundary | None:
        """What a commit of this layer keeps for the next run to go on behind it: see `HiddenStates.seal`."""
        return self.states.seal()


class LayerwiseForward:
    """One forward of all windows: within a `with`, call `start`, go through `steps`, then through `heads`.

    When the `with` ends, files of hidden states are deleted; when an exception ends it, they stay to go on.

    Args:
        skeleton: the model on the meta device; its buffers are materialised here, its layers loaded in turn.
        source: the checkpoint it was built for.
        tokens: int [windows, seq].
        batch: windows per forward.
        folder: for what doesn't fit `limits`; its files are deleted, save the one that `start` goes on from.
        advance: called with (layer, batch) after each batch, for progress; what it raises ends the forward.

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
    ) -> None:
        materialise_buffers(skeleton.model, device)
        self.decoder = find_decoder(skeleton.model)
        self._weights = Weights(self.decoder, skeleton.parameter_of, source, device)
        self._batches = tokens.split(batch)
        self._device = device
        self._states = HiddenStates(folder / "hidden", len(self._batches), device, limits)
        self._calls = Calls(folder / "arguments", len(self._batches), device, limits)
        self._advance = advance
        self._returns = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-weights")

    def __enter__(self) -> "LayerwiseForward":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._calls.close()
        if kind is None:
            self._states.close()

    def start(self, boundary: Boundary | None = None) -> int:
        """Embed all batches and record the arguments of every layer. Returns the first layer that is yet to
        run: the one behind `boundary`, or 0 when none is given or its file is gone or damaged."""
        restored = boundary is not None and self._states.restore(boundary)
        if not restored:
            self._states.begin()
        self._weights.load(OUTSIDE, self._weights.read(OUTSIDE))
        for index, batch in enumerate(self._batches):
            tokens = self._tokens(batch)
            if index == 0:
                self._returns, taken = examine(self.decoder, tokens)
            else:
                taken = capture(self.decoder, tokens, self._returns)
            self._calls.add(index, tokens.shape, taken.calls)
            if not restored:
                self._states.write(index, {HIDDEN: taken.hidden})
        self._weights.free(OUTSIDE)
        if not restored:
            self._states.turn()
        return self._states.layer

    def steps(self, observe: Observe = lambda layer, module: nullcontext(), first: int = 0) -> Iterator[Step]:
        """Run the layers that are left, and yield those from `first` on, each while its weights are still
        loaded.

        observe: entered with (layer, module) around all batches of each layer that is yielded. Layers before
        `first` are only run: that recomputes the hidden states behind the last committed layer.
        """
        for layer in self._loaded(range(self._states.layer, len(self.decoder.layers))):
            module = self.decoder.layers[layer]
            with observe(layer, module) if layer >= first else nullcontext():
                self._run(layer, module)
            if layer >= first:
                yield Step(layer, self.decoder.name(layer), module, self._states)
            self._calls.drop(layer)
            self._states.turn()

    def _loaded(self, layers: range) -> Iterator[int]:
        """Each layer while it has its weights; those of the next are read meanwhile."""
        upcoming: Future[dict[str, torch.Tensor]] | None = None
        for layer in layers:
            read = upcoming or self._reader.submit(self._weights.read, layer)
            self._weights.load(layer, read.result())
            upcoming = self._reader.submit(self._weights.read, layer + 1) if layer + 1 in layers else None
            yield layer
            self._weights.free(layer)

    @torch.inference_mode()
    def _run(self, layer: int, module: nn.Module) -> None:
        for batch in range(len(self._batches)):
            call = self._calls.bind(layer, batch, self._states.read(batch))
            self._states.write(batch, call.run(module, self._returns))
            self._advance(layer, batch)

    def heads(self) -> Iterator[torch.Tensor]:
        """After the last layer: the output head's input of each batch, [windows, seq, hidden]."""
        self._weights.load(OUTSIDE, self._weights.read(OUTSIDE))
        for index, batch in enumerate(self._batches):
            hidden = self._states.read(index)[HIDDEN]
            yield finish(self.decoder, self._tokens(batch), hidden, self._returns)
        self._weights.free(OUTSIDE)

    def _tokens(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(self._device, torch.int64)
