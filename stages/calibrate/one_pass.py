"""One pass over the tokens, under either schedule, committing as it goes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from stages.calibrate.forward.buffers import Limits
from stages.calibrate.forward.whole_model import load_model
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.arrays import plan_layout
from stages.calibrate.observe.attach import record_weights
from stages.calibrate.observe.complete import require_tokens
from stages.calibrate.observe.finite import first_overflow, overflow_message
from stages.calibrate.observe.layer_parts import layer_parts
from stages.calibrate.prepare import Prepared, probe_loaded
from stages.calibrate.schedule.choose import Name, outdated_layers, solved_layers, unsolved_layers
from stages.calibrate.schedule.layerwise import LayerByLayer
from stages.calibrate.schedule.proving import Prover
from stages.calibrate.schedule.quantized_stream import QuantizedStream
from stages.calibrate.schedule.solving import SolverPass
from stages.calibrate.schedule.steps import Schedule, Step
from stages.calibrate.schedule.whole import WholeModel
from stages.calibrate.signals import StopRequest
from stages.commands import calibrate_command
from stages.fold.proof import LayerProof
from stages.model.weights import read_tensor
from stages.progress import Progress
from stages.recipe.chain import told
from stages.settings import CalibrateSettings
from stages.solve.more_windows import more_windows
from state.background import BackgroundWriter
from state.errors import Difference, IdentityMismatch, InputError, Stopped
from state.identity import Environment, require_same
from state.layout import Layout
from state.place import PlacedDisk
from state.reader import open_run
from state.store import RunWriter
from state.update import Generation, Update

DEVICE_SHARE = 0.25  # of a GPU's free memory that hidden states may take


@dataclass
class Pass:
    """A pass and what it writes to. `run` does it."""

    settings: CalibrateSettings
    work: Prepared
    writer: RunWriter
    stop: StopRequest
    progress: Progress
    disk: PlacedDisk
    tokens: int = 0

    def run(self, name: Name) -> int:
        """Go from the run's cursor to the end of the pass. Returns the tokens this process took in."""
        schedule, statistics = self._whole() if name == "whole" else self._layerwise()
        cursor = self.writer.head.cursor
        background = BackgroundWriter(
            self.writer, lambda head, seconds: self.progress.committed(head.number, seconds)
        )
        self.stop.check()
        # The schedule is left last: what it clears away is needed until the last commit is whole.
        with schedule, self.stop.waiting(lambda: background.busy), background:
            self.progress.start("calibrating", schedule.total(), "batches", schedule.done(cursor))
            last = time.monotonic()
            for step in schedule.steps(cursor):
                due = time.monotonic() - last >= self.settings.commit_every and not background.busy
                if step.commit or step.finished or self.stop or due:
                    background.submit(self._update(step, statistics))
                    last = time.monotonic()
                if self.stop and not step.finished:
                    background.wait()
                    self._stopped(f"{schedule.done(step.cursor)} of {schedule.total()} batches committed")
        self.progress.finish()
        return self.tokens

    def _update(self, step: Step, statistics: Accumulators) -> Update:
        """What a commit of a step publishes.

        Raises IdentityMismatch where a file of the model changed under it, DamagedStore where the statistics
        do not hold the tokens that went through, and InputError where the model overflowed.
        """
        self.work.source.require_unchanged()
        generation = None
        if not self.writer.head.finished:
            generation = Generation(statistics.layout, statistics.snapshot())
            before = None if step.finished else step.cursor.layer or None
            require_tokens(statistics.layout, generation.arrays, step.tokens, before)
            self._refuse_overflow(statistics.layout, generation.arrays)
        outdated = self._outdated(step.outdated)
        return Update(step.cursor, step.finished, generation, step.solutions, outdated)

    def _outdated(self, layers: Mapping[int, int]) -> tuple[tuple[str, int], ...]:
        """Solutions that hold no more, as a commit takes them out; they are told of."""
        if not layers or self.work.solver is None:
            return ()
        self.progress.warn(f"{told(layers)}; this is done again")
        return tuple((self.work.solver.id, layer) for layer in sorted(layers))

    def _refuse_overflow(self, layout: Layout, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise InputError naming the first site that saw inf or NaN."""
        site = first_overflow(layout, arrays, self.work.skeleton.projections())
        if site is not None:
            again = {"dtype": "bfloat16", "run": f"{self.settings.run}-bfloat16"}
            command = calibrate_command(self.settings.model_dump(mode="json") | again)
            raise InputError(overflow_message(site, self.work.environment.dtype, command))

    def _tick(self, tokens: int) -> None:
        self.disk.check()
        self.tokens += tokens
        self.progress.advance(1, tokens=tokens)

    def _tick_or_stop(self, tokens: int | None) -> None:
        """Between two batches of a layer a stop need not wait: the layer is not committed anyway."""
        if tokens is not None:
            self._tick(tokens)
        if self.stop:
            self._stopped(f"layers before {self.writer.head.cursor.layer} are committed")

    def _stopped(self, where: str) -> None:
        self.writer.event("stopped", signal=self.stop.name)
        raise Stopped(stop_message(self.stop, self.settings, where))

    def _whole(self) -> tuple[Schedule, Accumulators]:
        work, settings = self.work, self.settings
        self.progress.stage(f"loading {work.folder.name} onto {work.device}")
        model = load_model(work.skeleton, work.source, work.device, settings.experts)
        layout = plan_layout(work.skeleton, probe_loaded(work, model))
        stored = self._stored(layout)
        statistics = Accumulators(layout, work.device, stored)
        if stored is None:
            record_weights(work.skeleton, model, statistics)
        begun_with = self.writer.record.environment.batch
        schedule = WholeModel(
            work.skeleton, model, statistics, work.tokens, begun_with, settings.batch, self._tick
        )
        return schedule, statistics

    def _layerwise(self) -> tuple[Schedule, Accumulators]:
        work, settings = self.work, self.settings
        assert work.probe is not None
        self.progress.stage(f"one layer of {work.folder.name} at a time on {work.device}")
        layout = plan_layout(work.skeleton, work.probe)
        statistics = Accumulators(layout, work.device, self._stored(layout))
        if work.skeleton.model._can_set_experts_implementation():
            work.skeleton.model.set_experts_implementation(settings.experts)
        solver = self._solver(statistics)
        circumstances, more = work.circumstances, None
        if solver is not None and solver.two_streams:
            circumstances["solver"] = solver.solver.id
            more = more_windows(work.tokens) if solver.solver.method == "tune" else None
        schedule = LayerByLayer(
            work.skeleton,
            work.source,
            statistics,
            work.tokens,
            settings.batch,
            work.device,
            settings.run,
            _limits(settings, work.device),
            self.writer.head.finished,
            solver,
            self._tick_or_stop,
            circumstances,
            self.progress.warn,
            more,
        )
        return schedule, statistics

    def _solver(self, statistics: Accumulators) -> SolverPass | None:
        work, head = self.work, self.writer.head
        if work.solver is None or not unsolved_layers(work, work.solver, head, self.settings.run):
            return None
        if broken := outdated_layers(work.solver, head, self.settings.run):
            outdated = self._outdated(broken)
            head = self.writer.commit(Update(head.cursor, head.finished, outdated=outdated))
        solved = solved_layers(work.solver.id, head)
        if solved:
            self._require_same_environment(work.solver.id, min(solved))
        assert work.probe is not None
        parts = layer_parts(work.skeleton, work.probe, statistics.layout.relations, work.source.tensors)
        prover = Prover(work.skeleton, parts, self._proofs(work.solver.id, solved), self.progress.note)
        attributes = {"environment": work.environment.model_dump(mode="json")}

        solver, stream, stored = work.solver, None, open_run(self.settings.run)
        if solver.two_streams:
            stream = QuantizedStream(work.skeleton, work.quantizers, statistics)

        def require_finite(layer: int) -> None:
            if not statistics.is_finite(layer):
                self._refuse_overflow(statistics.layout, statistics.snapshot())

        return SolverPass(
            solver,
            work.quantizers,
            work.skeleton,
            statistics,
            prover,
            solved,
            attributes,
            self.stop,
            require_finite,
            lambda name: read_tensor(work.source, name),
            stream,
            lambda layer: stored.solution(solver.id, layer),
            self.progress.warn,
        )

    def _proofs(self, solver_id: str, solved: set[int]) -> list[LayerProof]:
        """What earlier processes proved of solved layers."""
        if not solved:
            return []
        run = open_run(self.settings.run)
        every = (run.solution(solver_id, layer).attributes for layer in sorted(solved))
        return [LayerProof.decode(found["proof"]) for found in every if "proof" in found]

    def _require_same_environment(self, solver_id: str, layer: int) -> None:
        """Solutions of one solver come from one environment, or from several by consent."""
        stored = open_run(self.settings.run).solution(solver_id, layer).attributes["environment"]
        if not self.settings.accept_environment:
            require_same(
                Environment.model_validate(stored),
                self.work.environment,
                f"{solver_id} in {self.settings.run} was begun in another environment",
                "go on there, or here with --accept-environment",
            )

    def _stored(self, layout: Layout) -> dict[str, np.ndarray] | None:
        """The statistics committed so far."""
        if self.writer.head.generation is None:
            return None
        stored = open_run(self.settings.run).generation()
        if stored.layout != layout:
            differences = other_sites(stored.layout, layout)
            raise IdentityMismatch(
                f"{self.settings.run} holds other sites than the model has now; calibrate into another RUN:\n"
                + "\n".join(f"  {difference}" for difference in differences),
                differences,
            )
        self.writer.event("resumed", cursor=self.writer.head.cursor.model_dump())
        return dict(stored.arrays)


def other_sites(stored: Layout, current: Layout) -> list[Difference]:
    """How two layouts differ, array by array."""
    a, b = ({array.key: array.model_dump_json() for array in layout.arrays} for layout in (stored, current))
    arrays = [Difference(f"sites.{key}", a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)]
    rest = [
        Difference(name, str(getattr(stored, name)), str(getattr(current, name)))
        for name in ("aliases", "quantizers", "relations")
        if getattr(stored, name) != getattr(current, name)
    ]
    return arrays + rest


def stop_message(stop: StopRequest, settings: CalibrateSettings, where: str) -> str:
    """What a person is told who stopped a calibration."""
    return f"stopped by {stop.name}: {where} in {settings.run}; the same command goes on from there"


def _limits(settings: CalibrateSettings, device: torch.device) -> Limits:
    on_device = 0
    if device.type == "cuda":
        on_device = int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    return Limits(device=on_device, host=settings.activation_memory)
