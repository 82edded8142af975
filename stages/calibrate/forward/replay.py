"""The second stream, x_q: hidden states as they leave quantized layers, beside those of the model as it is.

Both go from layer to layer. The first gives statistics and targets; the second is what a quantized layer will
be handed when it is served, and goes on behind a layer once that is solved.
"""

from dataclasses import dataclass

import torch

from stages.calibrate.forward.buffers import HIDDEN, State
from stages.calibrate.forward.calls import Calls, Layer
from stages.calibrate.forward.hidden import HiddenStates


@dataclass(frozen=True)
class Replay:
    """Runs a loaded layer, or what stands for it, from the second stream.

    calls, layer, returns: how the layer is called. first: the first stream, gone through the layer already.
    second: the second one, before the layer. batches: how many there are.
    """

    calls: Calls
    layer: int
    returns: int
    first: HiddenStates
    second: HiddenStates
    batches: int

    def run(self, batch: int, layer: Layer) -> State:
        """The state behind `layer` for a batch. May be called again, under autograd too."""
        return self.call(batch, self.second.peek(batch), layer)

    def call(self, batch: int, state: State, layer: Layer) -> State:
        """The state behind `layer` for a batch whose state before it is given."""
        return self.calls.bind(self.layer, batch, state, last=False).run(layer, self.returns)

    def differentiable(self, batch: int, layer: Layer) -> torch.Tensor:
        """The hidden state behind `layer` for a batch, with a gradient; to be called outside inference mode,
        whose tensors are copied.
        """
        call = self.calls.bind(self.layer, batch, self.second.peek(batch), last=False)
        return call.copied().run(layer, self.returns)[HIDDEN]

    def target(self, batch: int) -> torch.Tensor:
        """The first stream's hidden state behind the layer, [windows, seq, channels]."""
        return self.first.peek_behind(batch)[HIDDEN]

    @torch.inference_mode()
    def sweep(self, layer: Layer) -> None:
        """All batches through `layer`, for hooks to see; the stream stays before the layer."""
        for batch in range(self.batches):
            self.run(batch, layer)

    @torch.inference_mode()
    def advance(self, layer: Layer) -> None:
        """All batches through `layer`; the stream is behind it from now on."""
        for batch in range(self.batches):
            self.second.write(batch, self.call(batch, self.second.read(batch), layer))
