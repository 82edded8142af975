"""Holdfast for programs: everything that a program imports, under one name.

    from pathlib import Path
    import holdfast

    run = Path("runs/qwen3")
    holdfast.calibrate(holdfast.CalibrateSettings(model="Qwen/Qwen3-30B-A3B", data="chats.jsonl", run=run))
    holdfast.export(holdfast.ExportSettings(run=run, out=Path("exports/qwen3-nvfp4")))
    holdfast.open(run).amax("model.layers.2.mlp.experts.17.down_proj")

Importing this takes no torch; a stage brings it in when it is called. What a person can put right is raised
as a `HoldfastError`, and its message says how.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from stages.progress import Progress, Silent
from stages.settings import CalibrateSettings, ExportSettings, QuantizeSettings, VerifySettings
from state.errors import (
    DamagedStore,
    Difference,
    HoldfastError,
    IdentityMismatch,
    InputError,
    OutOfSpace,
    RunBusy,
    Stopped,
    Unreadable,
    WriteFailed,
)
from state.reader import Calibration, open_run

if TYPE_CHECKING:  # torch comes with them
    from torch import nn

    from stages.calibrate.summary import Summary
    from stages.export.report import ExportReport
    from stages.quantize import Quantized
    from stages.verify.report import VerifyReport

__all__ = [
    "CalibrateSettings",
    "Calibration",
    "DamagedStore",
    "Difference",
    "ExportSettings",
    "HoldfastError",
    "IdentityMismatch",
    "InputError",
    "OutOfSpace",
    "Progress",
    "QuantizeSettings",
    "RunBusy",
    "Stopped",
    "Unreadable",
    "VerifySettings",
    "WriteFailed",
    "__version__",
    "calibrate",
    "capture",
    "export",
    "open",
    "quantize",
    "verify",
]

__version__ = version("holdfast")


def open(run: Path | str, verify: bool = True) -> Calibration:
    """Open a run for reading, also while it is being calibrated; nothing is locked or changed.

        run = holdfast.open("runs/qwen3")
        run.amax("model.layers.2.mlp.experts.17.down_proj")  # float32 [channels]

    Args:
        verify: check every file against its digest now, and fall back a commit where statistics are damaged
            (see `notes` of what is returned); damaged solutions are absent. Otherwise each file is checked
            when it is read.

    Raises:
        InputError: there is no run, or it is of a newer Holdfast; Unreadable where a file can't be read now.
        DamagedStore: no commit of it is whole.
    """
    return open_run(run, verify)


def calibrate(settings: CalibrateSettings, progress: Progress | None = None) -> "Summary":
    """Measure a model on text into a run, or go on with the run that is there. What was committed stays.

        holdfast.calibrate(
            holdfast.CalibrateSettings(
                model="Qwen/Qwen3-30B-A3B", data="chats.jsonl", run=Path("runs/qwen3"), recipe="nvfp4"
            )
        )

    Args:
        progress: told what is going on; nobody is, without it.

    Raises:
        InputError: something given is missing, malformed or not supported, or RunBusy, OutOfSpace.
        IdentityMismatch: the run is of other content, settings or environment; its `differences` say which.
        DamagedStore: no commit of the run is whole.
        Stopped: SIGINT, SIGTERM, SIGHUP or SIGUSR1 came, or `stop_after` was over; the same call goes on.
    """
    from stages.calibrate.run import calibrate

    return calibrate(settings, progress or Silent())


def export(settings: ExportSettings, progress: Progress | None = None) -> "ExportReport":
    """Turn a run and its model into a quantized checkpoint, or go on where an earlier call was cut short.

        report = holdfast.export(
            holdfast.ExportSettings(run=Path("runs/qwen3"), out=Path("exports/qwen3-fp8"), recipe="fp8")
        )
        report.policy_counts()  # {"unseen=layer": 3}

    Args:
        progress: told what is going on; nobody is, without it.

    Raises:
        InputError: the run is unfinished, a policy says `error`, or the recipe can't be served; or RunBusy,
            OutOfSpace.
        IdentityMismatch: the model is not the run's, or another export is in the folder.
        DamagedStore: the run is damaged.
    """
    from stages.export.run import export

    return export(settings, progress or Silent())


def quantize(settings: QuantizeSettings, progress: Progress | None = None) -> "Quantized":
    """Calibrate, then export: both stages in one call, which goes on wherever an earlier one was cut short.

        done = holdfast.quantize(
            holdfast.QuantizeSettings(
                model="Qwen/Qwen3-30B-A3B", data="chats.jsonl", out=Path("exports/qwen3-nvfp4")
            )
        )
        done.export.policy_counts()  # {"unseen=layer": 3}

    The run stays in `settings.run_folder`. What export would refuse is refused before anything is measured,
    as far as it can be known by then.

    Args:
        progress: told what is going on; nobody is, without it.

    Raises:
        InputError, IdentityMismatch, DamagedStore: as `calibrate` and `export` do.
        Stopped: SIGINT, SIGTERM, SIGHUP or SIGUSR1 came, or `stop_after` was over; the same call goes on.
    """
    from stages.quantize import quantize

    return quantize(settings, progress or Silent())


def verify(settings: VerifySettings, progress: Progress | None = None) -> "VerifyReport":
    """Look at every tensor of a checkpoint, whoever wrote it, by the rules of the engines that will load it.

        report = holdfast.verify(holdfast.VerifySettings(out=Path("exports/qwen3-fp8"), target="vllm"))
        report.whole  # nothing is wrong
        report.counts()  # {"missing-tensor": 3}

    Writes OUT/verify_report.json and changes nothing else.

    Args:
        progress: told what is going on; nobody is, without it.

    Raises:
        InputError: there is no checkpoint, or none in a layout that is known; or the source can't be read.
    """
    from stages.measure.run import measure
    from stages.verify.run import verify

    return verify(settings, progress or Silent(), measure)


def capture(
    model: "nn.Module", source: str, run: Path | str, recipe: str, progress: Progress | None = None
) -> Path:
    """Write what a model in memory, calibrated by modelopt, has measured to a new, finished run.

        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop)
        holdfast.capture(model, source="Qwen/Qwen3-30B-A3B", run="runs/rescued", recipe="nvfp4")

    Args:
        model: as `mtq.quantize` returned it.
        source: the unquantized model it was made from, a folder or hub id; export reads the weights there.
        recipe: what export uses unless told otherwise.

    Raises:
        InputError: the run exists, or the model holds no amax that can be kept.
    """
    from stages.capture import capture

    return capture(model, source, run, recipe, progress)
