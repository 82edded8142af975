"""The calibrate stage: from a model and text to a run, going on wherever an earlier process stopped."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from stages.calibrate.accumulate import Accumulators
from stages.calibrate.arrays import plan_layout
from stages.calibrate.identify import environment, identify
from stages.calibrate.load import load_model, load_tokenizer, pick_device
from stages.calibrate.observe import observed, record_weights
from stages.calibrate.relations import Probe, probe
from stages.calibrate.schedule import Schedule
from stages.calibrate.signals import StopRequest, stop_on_signal
from stages.calibrate.summary import Summary, measure_coverage
from stages.calibrate.texts import DataUnreachable
from stages.calibrate.tokens import token_matrix
from stages.calibrate.whole import WholeModel
from stages.model_folder import locate
from stages.progress import Progress
from stages.quantizers import plan_quantizers
from stages.recipes import resolve
from stages.settings import CalibrateSettings
from stages.skeleton import Skeleton, load_config, refuse_quantized
from state.background import BackgroundWriter
from state.durable import Disk
from state.errors import IdentityMismatch, InputError, Stopped
from state.identity import Difference, Environment, Identity, require_same
from state.layout import Layout
from state.reader import open_run
from state.record import RunRecord, SourceDescription
from state.source import Source
from state.store import Claim, RunWriter, published
from state.update import Generation, Update


def calibrate(settings: CalibrateSettings, progress: Progress) -> Summary:
    """Calibrate a model, or go on with the run that is at `settings.run`.

    Raises InputError, IdentityMismatch, DamagedStore or RunBusy (see state.errors) with nothing lost, and
    Stopped when a signal asked for it and the progress is committed.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        writer = _existing(settings, progress)
        held: RunWriter | Claim = writer or Claim(settings.run)
        stack.enter_context(held)  # from here on nobody else may begin
        work = _prepare(settings, writer, progress)
        _stop_early(stop, settings)
        if isinstance(held, Claim):
            held = stack.enter_context(held.create(_record(settings, work), work.tokens))
        elif held.head.finished:
            progress.note(f"{settings.run} is finished; nothing to do")
            return _summary(settings, open_run(settings.run).generation(), 0, started, finished_before=True)
        statistics, tokens = _collect(settings, work, held, stop, progress)
        return _summary(settings, statistics, tokens, started, finished_before=False)


@dataclass
class _Work:
    """Everything known before a weight is loaded."""

    folder: Path
    config: PretrainedConfig
    skeleton: Skeleton
    probe: Probe | None
    tokens: NDArray[np.int32]
    device: torch.device
    identity: Identity
    environment: Environment


def _existing(settings: CalibrateSettings, progress: Progress) -> RunWriter | None:
    if not published(settings.run, Disk()):
        if settings.resume == "required":
            raise InputError(
                f"there is no run at {settings.run} to resume; leave --resume required out to begin one"
            )
        return None
    if settings.resume == "never":
        raise InputError(
            f"{settings.run} exists already; give another RUN, delete it, or leave --resume never out"
        )
    writer = RunWriter.resume(settings.run)
    for note in writer.notes:
        progress.warn(note)
    return writer


def _prepare(settings: CalibrateSettings, writer: RunWriter | None, progress: Progress) -> _Work:
    """Check everything that can be checked without loading weights, cheapest first."""
    progress.stage("planning")
    recipe = resolve(settings.recipe)
    device = pick_device(settings.device)
    folder = locate(settings.model, settings.revision, progress)
    config = load_config(folder, settings.trust_remote_code)
    refuse_quantized(config, folder)
    source = Source.open(folder)
    skeleton = Skeleton(config, source.tensors, settings.trust_remote_code)
    plan_quantizers(skeleton, recipe)
    tokens = _tokens(settings, folder, writer, progress)
    identity = identify(folder, source, config, tokens, progress)
    here = environment(skeleton, device, settings.experts, settings.batch)
    if writer is not None:
        require_same(
            writer.record.identity,
            identity,
            f"{settings.run} was calibrated from other content",
            "give another RUN to calibrate this, or the model, data and sizes of that run to go on with it",
        )
        _check_environment(settings, writer, here, progress)
    return _Work(folder, config, skeleton, _probe_on_meta(skeleton), tokens, device, identity, here)


def _tokens(
    settings: CalibrateSettings, folder: Path, writer: RunWriter | None, progress: Progress
) -> NDArray[np.int32]:
    try:
        return token_matrix(
            load_tokenizer(folder, settings.trust_remote_code),
            settings.data,
            samples=settings.samples,
            seq=settings.seq,
            split=settings.split,
            column=settings.column,
            progress=progress,
        )
    except DataUnreachable:
        if writer is None:
            raise
        progress.note(
            f"DATA {settings.data} can't be reached; going on with the tokens stored in {settings.run}"
        )
        return open_run(settings.run).tokens


def _check_environment(
    settings: CalibrateSettings, writer: RunWriter, here: Environment, progress: Progress
) -> None:
    if writer.head.finished:
        return
    try:
        require_same(
            writer.record.environment,
            here,
            f"{settings.run} was begun in another environment",
            "go on there, or here with ARGS=--accept-environment, which ends the promise of byte-identical "
            "statistics for this run",
        )
    except IdentityMismatch:
        if not settings.accept_environment:
            raise
        progress.warn("going on in another environment than the run began in, as asked; this is recorded")
        writer.accept_environment(here)


def _probe_on_meta(skeleton: Skeleton) -> Probe | None:
    """None for models whose forward needs real values, such as experts as separate linears: they are probed
    once loaded.
    """
    try:
        return probe(skeleton, skeleton.model)
    except (RuntimeError, NotImplementedError):
        return None


def _record(settings: CalibrateSettings, work: _Work) -> RunRecord:
    return RunRecord(
        settings=settings.model_dump(mode="json"),
        identity=work.identity,
        environment=work.environment,
        source=SourceDescription(model=settings.model, revision=settings.revision),
        generator={"holdfast": version("holdfast"), "zarr": version("zarr")},
    )


def _collect(
    settings: CalibrateSettings, work: _Work, writer: RunWriter, stop: StopRequest, progress: Progress
) -> tuple[Generation, int]:
    """Run the schedule from the run's cursor to the end. Returns the final statistics and the tokens this
    process took in.
    """
    progress.stage(f"loading {work.folder.name} onto {work.device}")
    model = load_model(work.folder, work.device, settings.experts, settings.trust_remote_code)
    layout = plan_layout(work.skeleton, work.probe or probe(work.skeleton, model))
    stored = _stored_statistics(settings, writer, layout)
    statistics = Accumulators(layout, work.device, stored)
    if stored is None:
        record_weights(work.skeleton, model, statistics)
    schedule: Schedule = WholeModel(model, work.tokens, settings.batch)
    cursor, total = writer.head.cursor, schedule.total()
    progress.start("calibrating", total, "batches", schedule.done(cursor))
    tokens, last = 0, time.monotonic()
    with (
        BackgroundWriter(
            writer, lambda head, seconds: progress.committed(head.number, seconds)
        ) as background,
        observed(work.skeleton, model, statistics),
    ):
        for step in schedule.steps(cursor):
            tokens += step.tokens
            progress.advance(1, tokens=step.tokens)
            finished = schedule.done(step.cursor) == total
            due = time.monotonic() - last >= settings.commit_every and not background.busy
            if finished or stop or due:
                newest = Generation(layout, statistics.snapshot())
                background.submit(Update(step.cursor, finished, newest))
                last = time.monotonic()
            if stop and not finished:
                background.wait()
                writer.event("stopped", signal=stop.name)
                raise Stopped(
                    _stopped(stop, settings, f"{schedule.done(step.cursor)} of {total} batches committed")
                )
    progress.finish()
    return newest, tokens


def _stored_statistics(
    settings: CalibrateSettings, writer: RunWriter, layout: Layout
) -> dict[str, np.ndarray] | None:
    if writer.head.generation is None:
        return None
    stored = open_run(settings.run).generation()
    if stored.layout != layout:
        raise IdentityMismatch(
            f"{settings.run} holds other sites than are found in the model now; calibrate into another RUN:\n"
            + "\n".join(f"  {difference}" for difference in _other_sites(stored.layout, layout)),
            _other_sites(stored.layout, layout),
        )
    writer.event("resumed", cursor=writer.head.cursor.model_dump())
    return dict(stored.arrays)


def _other_sites(stored: Layout, current: Layout) -> list[Difference]:
    a, b = ({array.key: array.model_dump_json() for array in layout.arrays} for layout in (stored, current))
    arrays = [Difference(f"sites.{key}", a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)]
    rest = [
        Difference(name, str(getattr(stored, name)), str(getattr(current, name)))
        for name in ("aliases", "quantizers", "relations")
        if getattr(stored, name) != getattr(current, name)
    ]
    return arrays + rest


def _stop_early(stop: StopRequest, settings: CalibrateSettings) -> None:
    if stop:
        raise Stopped(_stopped(stop, settings, "before the first batch"))


def _stopped(stop: StopRequest, settings: CalibrateSettings, where: str) -> str:
    return f"stopped by {stop.name}: {where} in {settings.run}; the same command goes on from there"


def _summary(
    settings: CalibrateSettings, generation: Generation, tokens: int, started: float, finished_before: bool
) -> Summary:
    return Summary(
        run=settings.run,
        recipe=settings.recipe,
        tokens=tokens,
        seconds=time.monotonic() - started,
        already_finished=finished_before,
        coverage=measure_coverage(generation.layout, generation.arrays),
    )
