"""Tunes how a layer's weights are rounded, so that the layer gives what it gave before quantization."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
    loss_scale,
    orders,
    rate_of,
    token_errors,
    token_weights,
)

CHECKED = 4
"""Of so many batches one is looked at again when a layer is tuned, to see whether it came nearer."""

WITHOUT = (
    "does not require grad",
    "is not implemented",
    "not differentiable",
    "does not have a deterministic implementation",
)
"""In messages of autograd's, which raises nothing but RuntimeError, for what it can't go back through."""


class NotTuned(Exception):
    """A layer that keeps its weights; the message says why."""


@dataclass(frozen=True)
class Tuned:
    """found: stacked name → how it is rounded. without: those whose rounding the output does not depend on,
    which are as they were.
    """

    found: dict[str, Quantized]
    without: frozenset[str]


def tune(step: LayerStep, stream: QuantizedStream, solved: dict[str, tuple[Quantized, Tensor]]) -> Tuned:
    """The layer's matrices rounded so that its output from the second stream is near the first stream's.

    Args:
        step: a layer whose weights are loaded; the second stream stands before it, and what the first made of
        it is its target. solved: stacked name → what GPTQ found, and its latents, f32 [E, N, K]; emptied, so
        that these need not lie in memory twice.

    Raises:
        NotTuned: autograd can't go back through the layer, its gradient is not finite, or the layer came no
        nearer to its target.
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


@contextmanager
def _told_of_gradients() -> Iterator[None]:
    """What autograd can't go back through as NotTuned; other errors, such as full memory, as they are."""
    try:
        yield
    except RuntimeError as error:
        if any(part in str(error) for part in WITHOUT):
            raise NotTuned(str(error).partition("\n")[0]) from error
        raise


class _Tuning:
    def __init__(
        self, step: LayerStep, stream: QuantizedStream, solved: dict[str, tuple[Quantized, Tensor]]
    ) -> None:
        assert step.replay is not None
        self.step, self.stream, self.replay = step, stream, step.replay
        self.matrices = LayerMatrices(stream.skeleton, stream.quantizers.weights, step.layer)
        self.dtype = next(step.module.parameters()).dtype
        self.latents = {name: Latent.of(*solved.pop(name)) for name in list(solved)}
        self.moved: set[str] = set()
        self.scale = 1.0

    def run(self) -> Tuned:
        with self.stream.rounded(self.step):
            with _told_of_gradients():
                weights, before = self._token_weights()
            together = min(-(-WINDOWS // len(weights[0])), len(weights))
            for number, batches in enumerate(orders(len(weights), together, self.step.layer)):
                with _told_of_gradients():
                    self._move(batches, weights, rate_of(number))
            self._require_nearer(weights, before)
        found = {name: latent.rounded() for name, latent in self.latents.items()}
        return Tuned(found, frozenset(self.latents.keys() - self.moved))

    def _replaced(self, weights: dict[str, Tensor]) -> Layer:
        return self.matrices.replaced(self.step.name, weights)

    def _weights(self) -> dict[str, Tensor]:
        """The layer's matrices under the latents as they stand, in the dtype it computes in."""
        return {name: latent.weights(self.dtype) for name, latent in self.latents.items()}

    @torch.no_grad()
    def _token_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """What each token of every batch counts, and its error so far: f32 [windows, seq]."""
        weights, errors = [], []
        layer = self._replaced(self._weights())
        for batch in range(self.replay.batches):
            target = self.replay.target(batch)
            if batch == 0:
                self.scale = loss_scale(target)
            weights.append(token_weights(target))
            errors.append(token_errors(self.replay.run(batch, layer)[HIDDEN], target))
        weighted = torch.cat([(error * own).flatten() for error, own in zip(errors, weights, strict=True)])
        parts = against_noise(weighted).split([own.numel() for own in errors])
        return [own * part.view_as(own) for own, part in zip(weights, parts, strict=True)], errors

    def _move(self, batches: list[int], weights: list[Tensor], rate: float) -> None:
        """One step of every latent, from the gradient over some batches."""
        own = {name: values.requires_grad_() for name, values in self._weights().items()}
        layer = self._replaced(own)
        total: dict[str, Tensor] = {}
        for batch in batches:
            output = self.replay.differentiable(batch, layer)
            errors = token_errors(output, self.replay.target(batch))
            loss = (errors * weights[batch]).sum() * self.scale
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            for name, gradient in zip(own, gradients, strict=True):
                if gradient is not None:
                    whole = gradient.float() if len(batches) > 1 else gradient
                    total[name] = total[name].add_(whole) if name in total else whole
        with torch.no_grad():
            for name, gradient in total.items():
                self.latents[name].move(gradient, rate)
        self.moved |= total.keys()

    @torch.no_grad()
    def _require_nearer(self, weights: list[Tensor], before: list[Tensor]) -> None:
        """Raise NotTuned unless the error fell, on one batch of CHECKED."""
        if not all(bool(latent.momentum.isfinite().all()) for latent in self.latents.values()):
            raise NotTuned("its gradient is not finite")
        layer = self._replaced(self._weights())
        was, found = 0.0, 0.0
        for batch in range(0, self.replay.batches, CHECKED):
            errors = token_errors(self.replay.run(batch, layer)[HIDDEN], self.replay.target(batch))
            was += (before[batch] * weights[batch]).sum().item()
            found += (errors * weights[batch]).sum().item()
        if self.moved and not found < was:
            raise NotTuned(f"its error went from {was:.3g} to {found:.3g}")
