"""The calibrate stage: from a model and text to a run, going on wherever an earlier process stopped."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import version

from stages.calibrate.by_layers import refusal
from stages.calibrate.forward.hidden import discard
from stages.calibrate.one_pass import Pass, stop_message
from stages.calibrate.prepare import Prepared, prepare
from stages.calibrate.schedule.choose import next_schedule
from stages.calibrate.schedule.layerwise import FOLDER
from stages.calibrate.signals import Interrupted, StopRequest, stop_on_signal
from stages.calibrate.summary import Summary, measure_coverage
from stages.model.decoder import LayerwiseUnsupported
from stages.progress import Progress
from stages.recipe.kept_plans import keep_plan, kept_plan
from stages.recipe.model_plan import describe
from stages.settings import CalibrateSettings, seconds
from state.claim import Claim
from state.durable import Disk
from state.errors import InputError, Stopped
from state.place import PlacedDisk
from state.reader import Calibration, open_run
from state.record import RunRecord, SourceDescription
from state.recovery import published
from state.store import RunWriter

NOTHING = "nothing was committed yet"


def calibrate(
    settings: CalibrateSettings, progress: Progress, agree: Callable[[Prepared], None] | None = None
) -> Summary:
    """Calibrate a model, or go on with the run that is at `settings.run`: statistics, and solutions where the
    recipe has a solver, from one pass where one layer is computed at a time.

    Args:
        agree: is shown what was prepared, before anything is measured; what it raises ends the calibration.

    Raises InputError, IdentityMismatch, DamagedStore or RunBusy (see state.errors) with nothing lost, and
    Stopped when a signal asked for it and the progress is committed.
    """
    with stop_on_signal() as stop:
        try:
            with limited(stop, settings.stop_after):
                return _calibrate(settings, progress, stop, agree)
        except Interrupted:
            where = "what was committed before is untouched" if published(settings.run, Disk()) else NOTHING
            raise Stopped(stop_message(stop, settings, where)) from None


def _calibrate(
    settings: CalibrateSettings,
    progress: Progress,
    stop: StopRequest,
    agree: Callable[[Prepared], None] | None,
) -> Summary:
    started = time.monotonic()
    stop.check()
    disk = PlacedDisk()
    with ExitStack() as stack:
        stack.callback(disk.leave)
        writer = _existing(settings, progress, disk)
        held: RunWriter | Claim = writer or Claim(settings.run, disk)
        stack.enter_context(held)  # from here on nobody else may begin
        disk.stay_at(settings.run)
        work = prepare(settings, writer, progress)
        if agree is not None:
            agree(work)
        stop.check()
        disk.check()
        if isinstance(held, Claim):
            held = stack.enter_context(held.create(_record(settings, work), work.tokens))
        else:
            held.restore_tokens(work.tokens)
        said = len(held.notes)
        _keep_plan(settings, work)
        tokens, did_something = 0, False
        while (schedule := next_schedule(settings, work, held.head)) is not None:
            try:
                tokens += Pass(settings, work, held, stop, progress, disk).run(schedule)
            except LayerwiseUnsupported as error:
                raise refusal(error, settings, work.solver) from error
            did_something = True
        for note in held.notes[said:]:
            progress.warn(note)
        disk.check()
        if left := discard(settings.run / FOLDER):
            progress.note(f"{left[0]} was not made by Holdfast and stays where it is")
        if not did_something:
            progress.note(f"{settings.run} is finished; nothing to do")
        return _summary(settings, open_run(settings.run), tokens, started, not did_something)


def limited(stop: StopRequest, stop_after: str | None) -> AbstractContextManager[None]:
    """A context in which the time limit holds, where one is given."""
    if stop_after is None:
        return nullcontext()
    return stop.limited(seconds(stop_after), f"--stop-after {stop_after}")


def _existing(settings: CalibrateSettings, progress: Progress, disk: Disk) -> RunWriter | None:
    if not published(settings.run, disk):
        if settings.resume == "required":
            raise InputError(
                f"there is no run at {settings.run} to resume; leave --resume required out to begin one"
            )
        return None
    if settings.resume == "never":
        raise InputError(
            f"{settings.run} exists already; give another RUN, delete it, or leave --resume never out"
        )
    writer = RunWriter.resume(settings.run, disk)
    for note in writer.notes:
        progress.warn(note)
    return writer


def _keep_plan(settings: CalibrateSettings, work: Prepared) -> None:
    """What is known of the recipe by now, for exports to start from."""
    if kept_plan(settings.run, work.folder, work.source, settings.recipe) is None:
        plan = describe(work.skeleton, work.config, work.source, work.quantizers)
        keep_plan(settings.run, work.folder, work.source, settings.recipe, plan)


def _record(settings: CalibrateSettings, work: Prepared) -> RunRecord:
    return RunRecord(
        settings=settings.model_dump(mode="json", exclude={"stop_after"}),  # of a process, not of the run
        identity=work.identity,
        environment=work.environment,
        source=SourceDescription(model=settings.model, revision=settings.revision),
        generator={"holdfast": version("holdfast"), "zarr": version("zarr")},
    )


def _summary(
    settings: CalibrateSettings, calibration: Calibration, tokens: int, started: float, finished_before: bool
) -> Summary:
    generation = calibration.generation()
    return Summary(
        run=settings.run,
        recipe=settings.recipe,
        remembered=str(calibration.record.settings["recipe"]),
        tokens=tokens,
        seconds=time.monotonic() - started,
        already_finished=finished_before,
        coverage=measure_coverage(generation.layout, generation.arrays),
    )
