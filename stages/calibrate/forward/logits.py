"""The layerwise forward up to the logits, for who measures what a model predicts."""

import torch

from stages.calibrate.forward.arguments import finish
from stages.calibrate.forward.layer_weights import HEAD
from stages.calibrate.forward.layers import LayerwiseForward


class LayerwiseLogits(LayerwiseForward):
    """A forward whose output head can be run as well."""

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
