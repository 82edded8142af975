"""The layerwise schedule: one decoder layer on the device, all windows through it, its statistics and
solutions, one commit, the next layer.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.calibrate.forward.buffers import Limits
from stages.calibrate.forward.kept import Circumstances
from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.forward.layers import LayerwiseForward
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.attach import observed_keys_and_values, observed_rows, record_weights
from stages.calibrate.observe.second_moments import Moments
from stages.calibrate.observe.sinks import Selected, Sink
from stages.calibrate.schedule.steps import Step
from stages.model.skeleton import Skeleton
from stages.model.weights import largest_magnitude, map_tensor
from state.head import Cursor
from state.names import Site
from state.source import Source
from state.update import Solution

FOLDER = "activations"  # of hidden states that outgrow memory, in the run


class LayerSolver(Protocol):
    """What turns one layer's weights and second moments into a solution."""

    def missing(self, layer: int) -> bool:
        """Whether the run lacks this layer's solution."""

    def moments(self, layer: int) -> Moments:
        """An empty place for the second moments it needs of a layer."""

    @property
    def two_streams(self) -> bool:
        """Whether it takes second moments from the second stream, which it then advances."""

    def solve(self, step: LayerStep, moments: Moments) -> Solution | None:
        """The layer's solution, from its loaded weights; None where nothing in it is quantized."""

    def take_outdated(self) -> dict[int, int]:
        """Layers whose solutions hold no more since this was last asked → the layer that made them so."""

    def pass_by(self, step: LayerStep) -> None:
        """Go on behind a layer that is not solved now."""


class LayerByLayer:
    """One pass for statistics, solutions or both; a step is one decoder layer, the last one with the output
    head.

    Args:
        statistics: added to from layer `cursor.layer` on, unless they are finished already.
        solver: None for statistics alone.
        tick: called after each batch of a layer with the layer's share of its tokens, None where committed
        work is only done again.
        limits: memory for hidden states; what is larger goes to files in the run, which a crash leaves to go
        on from.
        circumstances, say: see `HiddenStates`.
        more: windows for the solver alone, int32 [windows, seq].
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: Source,
        statistics: Accumulators,
        tokens: NDArray[np.int32],
        batch: int,
        device: torch.device,
        run: Path,
        limits: Limits,
        finished: bool,
        solver: LayerSolver | None,
        tick: Callable[[int | None], None],
        circumstances: Circumstances,
        say: Callable[[str], None],
        more: NDArray[np.int32] | None = None,
    ) -> None:
        self.skeleton, self.source, self.statistics = skeleton, source, statistics
        self.finished, self.solver, self.device = finished, solver, device
        self.batches, self.tokens = -(-len(tokens) // batch), tokens.size
        sizes = [part.size for part in np.split(tokens, range(batch, len(tokens), batch))]
        windows = torch.from_numpy(tokens.astype(np.int64))
        self.forward = LayerwiseForward(
            skeleton,
            source,
            windows,
            batch,
            device,
            run / FOLDER,
            limits,
            lambda layer, number: tick(self._share(sizes[number], layer) if number < len(sizes) else None),
            None if finished else lambda: self._finishing.hand_to(statistics),
            circumstances,
            say,
            rehearsing=solver is not None,
            recompute=solver.pass_by if solver is not None and solver.two_streams else None,
            unobserved=None if more is None else torch.from_numpy(more.astype(np.int64)),
        )
        self._finishing = Selected()
        self._new_from = 0
        self._stack = ExitStack()
        self._outside_tensors = {} if finished else self._find_outside_tensors()

    def __enter__(self) -> Self:
        self._background = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="outside"))
        self._stack.enter_context(self.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def layers(self) -> int:
        return len(self.forward.decoder.layers)

    def total(self) -> int:
        return self.layers * self.batches

    def done(self, cursor: Cursor) -> int:
        return self._first(cursor) * self.batches

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        first = self._new_from = self._first(cursor)
        outside: Future[dict[Site, float]] | None = None
        self.forward.start(first)
        model, layout = self.skeleton.model, self.statistics.layout
        selected, wanted = Selected(), dict[int, Moments]()

        @contextmanager
        def observe(layer: int, _module: nn.Module) -> Iterator[None]:
            prefix = f"{self.forward.decoder.name(layer)}."

            def own(memory: str) -> bool:
                return memory.startswith(prefix)

            new = not self.finished and layer >= cursor.layer
            with (
                selected.hand_to(*self._sinks(layer, new, wanted)),
                observed_rows(self.skeleton, model, layout, selected, own),
            ):
                yield
            if new:  # behind the batches: a GPU has them to compute meanwhile
                record_weights(self.skeleton, model, self.statistics, own)

        with (
            observed_keys_and_values(self.skeleton, model, layout, selected),
            observed_rows(self.skeleton, model, layout, self._finishing, self._is_outside),
        ):
            for step in self.forward.steps(observe, first):
                last = step.layer + 1 == self.layers
                if not self.finished and step.layer == min(first + 1, self.layers - 1):
                    # Not behind the first layer, when a GPU has little queued: it would wait meanwhile.
                    outside = self._background.submit(self._outside_weights)
                solution, outdated = None, dict[int, int]()
                if self.solver is not None:
                    moments = wanted.pop(step.layer, None)
                    if moments is not None:
                        solution = self.solver.solve(step, moments)
                    else:
                        self.solver.pass_by(step)
                    outdated = self.solver.take_outdated()
                if last and outside is not None:
                    for site, amax in outside.result().items():
                        self.statistics.set_weight(*layout.locate(site), amax)
                elif not last:
                    step.seal()
                position = Cursor(pass_number=cursor.pass_number, layer=step.layer + 1)
                solutions = () if solution is None else (solution,)
                finished = self.finished or last
                yield Step(
                    position, finished, self.tokens, commit=True, solutions=solutions, outdated=outdated
                )

    def _share(self, tokens: int, layer: int) -> int | None:
        """A layer's part of the work on some tokens, counted in tokens; None where it is only done again."""
        if layer < self._new_from:
            return None
        return tokens * (layer + 1) // self.layers - tokens * layer // self.layers

    def _first(self, cursor: Cursor) -> int:
        """The first layer of which anything is missing."""
        layers = range(self.layers)
        lacking = [layer for layer in layers if self.solver is not None and self.solver.missing(layer)]
        statistics = self.layers if self.finished else min(cursor.layer, self.layers)
        return min([statistics, *lacking])

    def _sinks(self, layer: int, statistics: bool, wanted: dict[int, Moments]) -> list[Sink]:
        """What takes a layer's rows."""
        sinks: list[Sink] = [self.statistics] if statistics else []
        if self.solver is not None and self.solver.missing(layer):
            wanted[layer] = self.solver.moments(layer)
            if not self.solver.two_streams:
                sinks.append(wanted[layer])
        return sinks

    def _is_outside(self, memory: str) -> bool:
        """Whether a module belongs to no layer."""
        return self.forward.decoder.layer_of(memory) is None

    def _outside_weights(self) -> dict[Site, float]:
        """max |W| of every linear that belongs to no layer; runs in the background, while layers compute."""
        return {
            site: largest_magnitude(map_tensor(self.source, name).flatten()).item()
            for site, name in self._outside_tensors.items()
        }

    def _find_outside_tensors(self) -> dict[Site, str]:
        """The hub tensor of the weight of every linear that belongs to no layer; for a tied output head that
        of the embeddings.
        """
        tensor_of = {parameter: tensor for tensor, (parameter, _) in self.skeleton.parameter_of.items()}
        model = self.skeleton.model
        embeddings = model.get_input_embeddings()
        names = [f"{name}.weight" for name, module in model.named_modules() if module is embeddings]
        tied = tensor_of.get(names[0]) if names else None
        found = {
            Site(linear.hub, "weight"): f"{linear.hub}.weight"
            if linear.merged
            else tensor_of.get(f"{linear.memory}.weight", tied)
            for linear in self.skeleton.linears
            if self._is_outside(linear.memory)
        }
        return {site: tensor for site, tensor in found.items() if tensor is not None}
