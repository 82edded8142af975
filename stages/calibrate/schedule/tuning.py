"""Tunes how a layer's weights are rounded, so that the layer gives what it gave before quantization."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.calibrate.forward.buffers import HIDDEN
from stages.calibrate.forward.layers import LayerStep
from stages.calibrate.forward.replay import Replay
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.calibrate.schedule.quantized_stream import QuantizedStream
from stages.formats.quantized import Quantized
from stages.solve.rounding import (
    WINDOWS,
    Latent,
    against_noise,
    orders,
    rate_of,
    token_errors,
    token_weights,
)


def tune(
    step: LayerStep, stream: QuantizedStream, solved: Mapping[str, tuple[Quantized, Tensor]]
) -> dict[str, Quantized]:
    """The layer's matrices rounded so that its output from the second stream is near the first stream's.

    Args:
        step: a layer whose weights are loaded and that both streams stand before (the second) and behind
        (the first). solved: stacked name → what GPTQ found, and its latents, f32 [E, N, K].
    """
    with torch.inference_mode(False):
        return _Tuning(step, stream, solved).run()


class _Tuning:
    def __init__(
        self, step: LayerStep, stream: QuantizedStream, solved: Mapping[str, tuple[Quantized, Tensor]]
    ) -> None:
        assert step.replay is not None
        self.step, self.stream, self.replay = step, stream, step.replay
        self.matrices = LayerMatrices(stream.skeleton, stream.quantizers.weights, step.layer)
        self.dtype = next(step.module.parameters()).dtype
        self.latents = {
            name: Latent.of(quantized, values.clone()) for name, (quantized, values) in solved.items()
        }

    def run(self) -> dict[str, Quantized]:
        with self.stream.rounded(self.step):
            weights = self._token_weights()
            windows = len(weights[0])
            together = min(-(-WINDOWS // windows), len(weights))
            for number, batches in enumerate(orders(len(weights), together, self.step.layer)):
                self._move(batches, weights, rate_of(number))
        return {name: latent.rounded() for name, latent in self.latents.items()}

    def _weights(self) -> dict[str, Tensor]:
        """The layer's matrices under the latents as they stand, in the dtype it computes in."""
        return {name: latent.rounded().dequantize().to(self.dtype) for name, latent in self.latents.items()}

    def _token_weights(self) -> list[Tensor]:
        """What each token of every batch counts: f32 [windows, seq]."""
        replay, weights, errors = self.replay, [], []
        layer = self.matrices.replaced(self.step.name, self._weights())
        with torch.no_grad():
            for batch in range(replay.batches):
                target = replay.target(batch)
                weights.append(token_weights(target))
                errors.append(token_errors(replay.run(batch, layer)[HIDDEN], target) * weights[-1])
            noise = against_noise(torch.cat([own.flatten() for own in errors]))
            parts = noise.split([own.numel() for own in errors])
            return [own * part.view_as(own) for own, part in zip(weights, parts, strict=True)]

    def _move(self, batches: list[int], weights: list[Tensor], rate: float) -> None:
        """One step of every latent, from the gradient over some batches."""
        own = {name: values.requires_grad_() for name, values in self._weights().items()}
        layer = self.matrices.replaced(self.step.name, own)
        total: dict[str, Tensor] = {}
        for batch in batches:
            errors = token_errors(self.replay.differentiable(batch, layer), self.replay.target(batch).clone())
            loss = (errors * weights[batch]).sum()
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            for name, gradient in zip(own, gradients, strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
        with torch.no_grad():
            for name, gradient in total.items():
                self.latents[name].move(gradient, rate)
