"""Tunes how a layer's weights are rounded, so that the layer gives what it gave before quantization."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from stages.calibrate.forward.buffers import HIDDEN
from stages.calibrate.forward.calls import Layer
from stages.calibrate.forward.layer_step import LayerStep
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


class NoGradient(Exception):
    """A layer that autograd can't go back through; the message says at what."""


def tune(
    step: LayerStep, stream: QuantizedStream, solved: Mapping[str, tuple[Quantized, Tensor]]
) -> dict[str, Quantized]:
    """The layer's matrices rounded so that its output from the second stream is near the first stream's.

    Args:
        step: a layer whose weights are loaded; the second stream stands before it, the first behind it.
        solved: stacked name → what GPTQ found, and its latents, f32 [E, N, K].

    Raises:
        NoGradient: see there.
    """
    with torch.inference_mode(False), in_fixed_order(step.module):
        return _Tuning(step, stream, solved).run()


@contextmanager
def in_fixed_order(module: nn.Module) -> Iterator[None]:
    """On a GPU: sums in a fixed order. CUDA's gradients of gathers add with atomics, in any order."""
    if not next(module.parameters()).is_cuda:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    filling = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


class _Tuning:
    def __init__(
        self, step: LayerStep, stream: QuantizedStream, solved: Mapping[str, tuple[Quantized, Tensor]]
    ) -> None:
        assert step.replay is not None
        self.step, self.stream, self.replay = step, stream, step.replay
        self.matrices = LayerMatrices(stream.skeleton, stream.quantizers.weights, step.layer)
        self.dtype = next(step.module.parameters()).dtype
        self.latents = {
            name: Latent.of(quantized, values.clone(memory_format=torch.contiguous_format))
            for name, (quantized, values) in solved.items()
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
        return {name: latent.weights(self.dtype) for name, latent in self.latents.items()}

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
            for name, gradient in zip(own, self._gradients(batch, layer, own, weights[batch]), strict=True):
                if gradient is not None:
                    total[name] = total[name] + gradient if name in total else gradient
        with torch.no_grad():
            for name, gradient in total.items():
                self.latents[name].move(gradient, rate)

    def _gradients(
        self, batch: int, layer: Layer, own: dict[str, Tensor], weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Of the weighted squared error of a batch, with respect to each matrix; None where it has none."""
        try:
            output = self.replay.differentiable(batch, layer)
            errors = token_errors(output, self.replay.target(batch).clone())
            return torch.autograd.grad((errors * weights).sum(), list(own.values()), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what autograd raises: it has no class of its own
            raise NoGradient(str(error).partition("\n")[0]) from error
