"""Both stages in one process, from a model and text to a checkpoint: refused early, stopped and gone on with
as one.
"""

from dataclasses import dataclass

from stages.calibrate.observe.relations import engine_fused
from stages.calibrate.prepare import Prepared
from stages.calibrate.run import calibrate, limited
from stages.calibrate.signals import Interrupted, StopRequest, stop_on_signal
from stages.calibrate.summary import Summary
from stages.commands import quantize_command
from stages.export.beforehand import refuse_place, refuse_plan
from stages.export.report import ExportReport
from stages.export.run import export
from stages.model.folder import locate
from stages.progress import Progress
from stages.settings import QuantizeSettings
from state.errors import Stopped


@dataclass(frozen=True)
class Quantized:
    """What both stages say of themselves. calibration: None of a dry run, which measures nothing."""

    calibration: Summary | None
    export: ExportReport


def quantize(settings: QuantizeSettings, progress: Progress) -> Quantized:
    """Calibrate a model, or go on with the run, then export it, or go on with that. What export would refuse
    and can be known before is refused before anything is measured. With `dry_run`, nothing is measured: the
    run is there.

    Raises as `stages.calibrate.run.calibrate` and `stages.export.run.export` do, and Stopped when a signal or
    a time limit asked for it in either stage.
    """
    with stop_on_signal() as stop:
        try:
            return _quantize(settings, progress, stop)
        except Stopped as stopped:
            raise Stopped(f"{stopped}: {quantize_command(settings)}") from None
        except Interrupted:
            raise Stopped(
                f"stopped by {stop.name}: what was written before is untouched; the same command goes on "
                f"from there: {quantize_command(settings)}"
            ) from None


def _quantize(settings: QuantizeSettings, progress: Progress, stop: StopRequest) -> Quantized:
    stop.check()
    progress.stage("checking what can be exported")
    refuse_place(settings.export, settings.recipe)
    summary = None
    if not settings.dry_run:
        summary = calibrate(settings.calibration, progress, lambda work: _agree(settings, work))
        stop.check()
    with limited(stop, settings.stop_after):
        folder = locate(settings.model, settings.revision, progress)  # the run may know it by another path
        report = export(settings.export.model_copy(update={"model": str(folder)}), progress)
    return Quantized(summary, report)


def _agree(settings: QuantizeSettings, work: Prepared) -> None:
    """Refuse, once the model is known and before anything is measured, what export would."""
    refuse_plan(
        settings.export,
        work.source,
        work.quantizers,
        {module: work.skeleton.matrix(module) for module in work.quantizers.weights},
        list(engine_fused(work.skeleton)),
        work.identity,
    )
