"""The calibrate stage: from a model and text to a run, going on wherever an earlier process stopped."""

import time
from contextlib import ExitStack
from importlib.metadata import version

from stages.calibrate.forward.hidden import discard
from stages.calibrate.one_pass import Pass, stop_message
from stages.calibrate.prepare import Prepared, prepare
from stages.calibrate.schedule.choose import next_schedule
from stages.calibrate.schedule.layerwise import FOLDER
from stages.calibrate.signals import stop_on_signal
from stages.calibrate.summary import Summary, measure_coverage
from stages.progress import Progress
from stages.recipe.kept_plans import keep_plan, kept_plan
from stages.recipe.model_plan import describe
from stages.settings import CalibrateSettings
from state.claim import Claim
from state.durable import Disk
from state.errors import InputError, Stopped
from state.reader import Calibration, open_run
from state.record import RunRecord, SourceDescription
from state.recovery import published
from state.store import RunWriter


def calibrate(settings: CalibrateSettings, progress: Progress) -> Summary:
    """Calibrate a model, or go on with the run that is at `settings.run`: statistics, and solutions where the
    recipe has a solver, from one pass where one layer is computed at a time.

    Raises InputError, IdentityMismatch, DamagedStore or RunBusy (see state.errors) with nothing lost, and
    Stopped when a signal asked for it and the progress is committed.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        writer = _existing(settings, progress)
        held: RunWriter | Claim = writer or Claim(settings.run)
        stack.enter_context(held)  # from here on nobody else may begin
        work = prepare(settings, writer, progress)
        if stop:
            raise Stopped(stop_message(stop, settings, "before the first batch"))
        if isinstance(held, Claim):
            held = stack.enter_context(held.create(_record(settings, work), work.tokens))
        else:
            held.restore_tokens(work.tokens)
        said = len(held.notes)
        _keep_plan(settings, work)
        tokens, did_something = 0, False
        while (schedule := next_schedule(settings, work, held.head)) is not None:
            tokens += Pass(settings, work, held, stop, progress).run(schedule)
            did_something = True
        for note in held.notes[said:]:
            progress.warn(note)
        if left := discard(settings.run / FOLDER):
            progress.note(f"{left[0]} was not made by Holdfast and stays where it is")
        if not did_something:
            progress.note(f"{settings.run} is finished; nothing to do")
        return _summary(settings, open_run(settings.run), tokens, started, not did_something)


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


def _keep_plan(settings: CalibrateSettings, work: Prepared) -> None:
    """What is known of the recipe by now, for exports to start from."""
    if kept_plan(settings.run, work.folder, work.source, settings.recipe) is None:
        plan = describe(work.skeleton, work.config, work.source, work.quantizers)
        keep_plan(settings.run, work.folder, work.source, settings.recipe, plan)


def _record(settings: CalibrateSettings, work: Prepared) -> RunRecord:
    return RunRecord(
        settings=settings.model_dump(mode="json"),
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
