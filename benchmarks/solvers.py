"""What collecting and solving cost: layer by layer, against the bare forward and against modelopt's AWQ.

The weights of all layers are on the device throughout, ours and modelopt's. A pass of ours is the whole
layerwise schedule (embedding, observing, solving, copying solutions to the host) but for planning and
commits. modelopt's AWQ does not reach fused experts; ours solves every one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.forward import Pass
from benchmarks.modelopt_calibration import quantized
from benchmarks.models import Subject, load_whole
from benchmarks.section import Section
from benchmarks.timing import Timing, seconds, spread
from stages.calibrate.forward.buffers import Limits
from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.forward.layer_weights import OUTSIDE, Weights, materialise_buffers
from stages.calibrate.forward.layers import LayerwiseForward
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.arrays import plan_layout
from stages.calibrate.observe.layer_parts import layer_parts
from stages.calibrate.observe.relations import probe
from stages.calibrate.observe.second_moments import Moments
from stages.calibrate.schedule.layerwise import LayerByLayer, LayerSolver
from stages.calibrate.schedule.proving import Prover
from stages.calibrate.schedule.quantized_stream import QuantizedStream
from stages.calibrate.schedule.solving import SolverPass
from stages.calibrate.signals import StopRequest
from stages.model.decoder import find_decoder
from stages.model.skeleton import Skeleton, load_config
from stages.model.weights import read_tensor
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import resolve
from stages.recipe.solvers import solver_of
from state.head import Cursor
from state.source import Source
from state.update import Solution

BARE = "bare forward, grouped experts"
LAYERWISE = "the same, layer by layer"
STATISTICS = "statistics for max recipes"
RECIPES = {
    "AWQ lite": "nvfp4_awq_lite",
    "AWQ full": "nvfp4_awq_full",
    "GPTQ": "general/ptq/nvfp4_default-kv_none-gptq",
}
MODELOPTS = ("AWQ lite", "AWQ full")
UNLIMITED = Limits(device=1 << 40, host=1 << 40)
GROWTH = 4


@dataclass
class Timed:
    """A solver whose seconds are counted apart from those of its pass."""

    solver: SolverPass
    device: torch.device
    solutions: list[Solution]
    seconds: float = 0.0

    @property
    def two_streams(self) -> bool:
        return self.solver.two_streams

    def missing(self, layer: int) -> bool:
        return self.solver.missing(layer)

    def take_outdated(self) -> dict[int, int]:
        return self.solver.take_outdated()

    def pass_by(self, step: LayerStep) -> None:
        self.solver.pass_by(step)

    def moments(self, layer: int) -> Moments:
        return self.solver.moments(layer)

    def solve(self, step: LayerStep, moments: Moments) -> Solution | None:
        found: list[Solution] = []
        self.seconds += seconds(lambda: found.append(self.solver.solve(step, moments)), self.device)
        self.solutions += found
        return found[0]


class Resident:
    """A model whose layers stay loaded while passes go through them one by one.

    recipes: those that will be solved. solutions: what the last pass found.
    """

    def __init__(
        self, subject: Subject, device: torch.device, scratch: Path, recipes: Mapping[str, str]
    ) -> None:
        self.solutions: list[Solution] = []
        self.subject, self.device, self.scratch = subject, device, scratch
        self.source = Source.open(subject.model)
        self.skeleton = Skeleton(load_config(subject.model), self.source.tensors)
        model = self.skeleton.model
        found = probe(self.skeleton, model)
        self.layout = plan_layout(self.skeleton, found)
        self.parts = layer_parts(self.skeleton, found, self.layout.relations, self.source.tensors)
        self.plans = {name: plan_quantizers(self.skeleton, resolve(name)) for name in recipes.values()}
        self.parameters = sum(
            math.prod(self.source.tensors[f"{name}.weight"].shape)
            for name in next(iter(self.plans.values())).weights
        )
        if model._can_set_experts_implementation():
            model.set_experts_implementation("grouped_mm")
        materialise_buffers(model, device)
        decoder = find_decoder(model)
        weights = Weights(decoder, self.skeleton.parameter_of, self.source, device)
        for part in (OUTSIDE, *range(len(decoder.layers))):
            weights.load(part, weights.read(part))

    def forward(self, tokens: NDArray[np.int32]) -> float:
        """Seconds of a pass that observes nothing."""
        windows = torch.from_numpy(tokens.astype(np.int64))
        forward = LayerwiseForward(
            self.skeleton, self.source, windows, self.subject.batch, self.device, self.scratch, UNLIMITED
        )

        def run() -> None:
            with forward:
                forward.start()
                for _ in forward.steps():
                    pass

        return seconds(run, self.device)

    def observe(self, tokens: NDArray[np.int32]) -> float:
        """Seconds of a pass that collects what max recipes need."""
        return self._run(tokens, self._accumulators(), None)

    def solve(self, tokens: NDArray[np.int32], recipe: str) -> tuple[float, float]:
        """Seconds of a pass that collects and solves, without solving and of solving alone."""
        statistics, quantizers = self._accumulators(), self.plans[recipe]
        solver = solver_of(quantizers)
        assert solver is not None
        prover, stop = Prover(self.skeleton, self.parts, [], print), StopRequest()

        def finite(_layer: int) -> None:
            return

        def read(name: str) -> torch.Tensor:
            return read_tensor(self.source, name)

        stream = None
        if solver.two_streams:
            stream = QuantizedStream(self.skeleton, quantizers, statistics)

        def stored(layer: int) -> Solution:
            raise AssertionError(f"layer {layer} is solved in this pass")

        solving = SolverPass(
            solver,
            quantizers,
            self.skeleton,
            statistics,
            prover,
            set(),
            {},
            stop,
            finite,
            read,
            stream,
            stored,
            lambda message: print(message),
        )
        self.solutions = []
        timed = Timed(solving, self.device, self.solutions)
        both = self._run(tokens, statistics, timed)
        return both - timed.seconds, timed.seconds

    def _accumulators(self) -> Accumulators:
        return Accumulators(self.layout, self.device)

    def _run(self, tokens: NDArray[np.int32], statistics: Accumulators, solver: LayerSolver | None) -> float:
        schedule = LayerByLayer(
            self.skeleton,
            self.source,
            statistics,
            tokens,
            self.subject.batch,
            self.device,
            self.scratch,
            UNLIMITED,
            False,
            solver,
            lambda _tokens: None,
            {},
            print,
        )

        def run() -> None:
            with schedule:
                for _ in schedule.steps(Cursor()):
                    pass

        return seconds(run, self.device)


def compare_solvers(subject: Subject, device: torch.device, scratch: Path, repeat: int) -> Section:
    """Seconds of each kind of pass at the subject's tokens and at GROWTH times as many."""
    resident = Resident(subject, device, scratch / "layerwise", RECIPES)
    whole = load_whole(subject.model, device, "grouped_mm")
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {"solved_parameters": resident.parameters}
    for grown in (subject, replace(subject, samples=GROWTH * subject.samples)):
        tokens = grown.tokens()
        taken = _ours(resident, whole, tokens, repeat)
        for name in MODELOPTS if device.type == "cuda" else ():  # it searches NVFP4 on a GPU alone
            taken[f"modelopt {name}"] = spread([_modelopt(grown, device, RECIPES[name], tokens)])
        bare = taken[BARE].median
        for name, timing in taken.items():
            over = (
                timing.median / resident.parameters * 1e9
                if name.endswith("solving")
                else timing.median / bare
            )
            unit = "s per 10^9 parameters" if name.endswith("solving") else "x"
            rows.append((f"{name}, {tokens.size:,} tokens", str(timing), f"{over:.2f} {unit}"))
            figures[f"{tokens.size}/{name}"] = timing.median
    return Section(
        title=f"5. Solvers on {subject.name}, {resident.parameters / 1e9:.2f}e9 of them solved",
        columns=("seconds: median (range)", "over the bare forward"),
        rows=tuple(rows),
        notes=(
            "Aims on an H200: statistics 1.15 x, collecting 1.5 x, AWQ solving 1.5 s per 10^9 parameters,",
            "AWQ 25 times faster than modelopt's AWQ lite, which leaves the experts as they are.",
        ),
        figures=figures,
    )


def _ours(
    resident: Resident, whole: PreTrainedModel, tokens: NDArray[np.int32], repeat: int
) -> dict[str, Timing]:
    """All passes in turn, `repeat` times after a warm-up."""
    bare = Pass(whole, tokens, resident.subject.batch)
    taken: dict[str, list[float]] = {}
    for _ in range(repeat + 1):
        rounds = {
            BARE: seconds(bare, resident.device),
            LAYERWISE: resident.forward(tokens),
            STATISTICS: resident.observe(tokens),
        }
        for name, recipe in RECIPES.items():
            collecting, solving = resident.solve(tokens, recipe)
            rounds |= {
                f"{name}: collecting": collecting,
                f"{name}: solving": solving,
                f"{name}: both": collecting + solving,
            }
        for name, value in rounds.items():
            taken.setdefault(name, []).append(value)
    return {name: spread(values[1:]) for name, values in taken.items()}


def _modelopt(subject: Subject, device: torch.device, recipe: str, tokens: NDArray[np.int32]) -> float:
    """Seconds of modelopt's loops over the tokens and its search, once."""
    model = load_whole(subject.model, device, "eager")
    return seconds(lambda: quantized(model, recipe, lambda it: Pass(it, tokens, subject.batch)()), device)
