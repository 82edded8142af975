"""The command line: `holdfast calibrate`, `holdfast export`, `holdfast status`.

Stages are imported when a command needs them: torch takes seconds, and `--help` and `status` do without.
"""

import os
import signal
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import BaseModel

from pipeline.outcome import exit_codes
from stages.settings import CalibrateSettings, ExportSettings

EXIT_CODES = """
Exit codes: 0 done (or done before) · 2 something given is wrong or missing · 3 stored work is of other
content, settings or environment · 4 a stored object is damaged · 75 stopped, progress is committed: the same
command goes on.
"""

app = typer.Typer(
    help="Quantizes Hugging Face models after training, so that calibration can't be lost.\n\n"
    "calibrate measures a model once and commits as it goes; export turns the run into a checkpoint, in as "
    "many formats as you like; status looks at a run, also while it is being made.\n\n" + EXIT_CODES,
    epilog="Killed, out of space, out of time? Give the same command again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own warnings.")]
Run = Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def _default(settings: type[BaseModel], name: str) -> Any:
    return settings.model_fields[name].default


def _calibrate_default(name: str) -> Any:
    return _default(CalibrateSettings, name)


def _export_default(name: str) -> Any:
    return _default(ExportSettings, name)


@app.command(epilog=EXIT_CODES)
def calibrate(
    model: Annotated[
        str, typer.Argument(help="Folder of a Hugging Face model, or its hub id.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="JSONL, Parquet or plain text: a file, a folder, a glob in quotes, or a `datasets` name "
            "(NAME or NAME:CONFIG). Chat messages go through the chat template.",
            show_default=False,
        ),
    ],
    run: Run,
    recipe: Annotated[
        str,
        typer.Option(
            help="modelopt's name of a recipe, remembered as export's default. AWQ and GPTQ are solved here; "
            "any other is only checked."
        ),
    ] = _calibrate_default("recipe"),
    samples: Annotated[int, typer.Option(help="Windows of text.")] = _calibrate_default("samples"),
    seq: Annotated[int, typer.Option(help="Tokens per window.")] = _calibrate_default("seq"),
    batch: Annotated[int, typer.Option(help="Windows per forward.")] = _calibrate_default("batch"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = _calibrate_default("device"),
    experts: Annotated[
        Literal["grouped_mm", "eager"],
        typer.Option(
            help="How fused experts are computed. grouped_mm is fast; eager works where it does not."
        ),
    ] = _calibrate_default("experts"),
    commit_every: Annotated[
        float, typer.Option(help="Seconds between two commits: the most work that a crash can cost.")
    ] = _calibrate_default("commit_every"),
    resume: Annotated[
        Literal["auto", "never", "required"],
        typer.Option(help="Go on with the run that is at RUN: if there is one, never, or only so."),
    ] = _calibrate_default("resume"),
    schedule: Annotated[
        Literal["auto", "whole", "layerwise"],
        typer.Option(
            help="The whole model on the device, or one decoder layer at a time; auto takes layers where a "
            "solver needs them or the model does not fit."
        ),
    ] = _calibrate_default("schedule"),
    activation_memory: Annotated[
        int,
        typer.Option(help="Bytes of hidden states kept in memory between layers; more go to files in RUN."),
    ] = _calibrate_default("activation_memory"),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a `datasets` data set.")] = _calibrate_default("split"),
    column: Annotated[
        str | None, typer.Option(help="Column of text or messages. Found by itself where it is plain.")
    ] = None,
    accept_environment: Annotated[
        bool,
        typer.Option(
            "--accept-environment",
            help="Go on with an unfinished run although versions, device or batch differ. Recorded; the "
            "statistics may then differ in the last bit from those of an undisturbed run.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Measures a model on text, and keeps what it measures in RUN.

    The forward is unquantized; for every site and channel the largest and summed |x| are kept, so one run
    serves FP8 and NVFP4 alike. A recipe with AWQ or GPTQ adds its solutions to the run, also to a finished
    one. Commits come every 30 s. Ctrl-C commits, too. The same command again goes on
    where it stopped; a finished run says so and does nothing.

    **Examples**

    `holdfast calibrate Qwen/Qwen3-30B-A3B chats.jsonl runs/qwen3`

    `holdfast calibrate ./model 'texts/*.txt' runs/mine --recipe fp8 --samples 256 --seq 4096`

    `holdfast calibrate Qwen/Qwen3-30B-A3B chats.jsonl runs/qwen3 --recipe nvfp4_awq_full`

    `holdfast calibrate ./model wikitext:wikitext-2-raw-v1 runs/wiki --split test --device cuda:1`
    """
    with exit_codes(debug):
        settings = CalibrateSettings(
            model=model,
            data=data,
            run=run,
            revision=revision,
            split=split,
            column=column,
            recipe=recipe,
            samples=samples,
            seq=seq,
            batch=batch,
            device=device,
            experts=experts,
            commit_every=commit_every,
            resume=resume,
            accept_environment=accept_environment,
            trust_remote_code=trust_remote_code,
            schedule=schedule,
            activation_memory=activation_memory,
        )
        _quiet(debug)
        from pipeline.progress import reporting
        from pipeline.summary import print_calibration

        with reporting() as progress:
            progress.stage("loading libraries")
            from stages.calibrate.run import calibrate

            summary = calibrate(settings, progress)
        print_calibration(summary)


@app.command(epilog=EXIT_CODES)
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint to make.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(help="modelopt's name of a recipe; without it, the one given to calibrate.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is now, if it has moved since calibrate.")
    ] = None,
    unseen: Annotated[
        Literal["layer", "weights-only", "error"],
        typer.Option(
            help="An expert that no token reached: gets the largest scale of its layer, is stored in a "
            "weight-only format, or is an error."
        ),
    ] = _export_default("unseen"),
    conflict: Annotated[
        Literal["max", "error"],
        typer.Option(help="Modules that saw one tensor and disagree about it: take the max, or stop."),
    ] = _export_default("conflict"),
    dead: Annotated[
        Literal["floor", "error"],
        typer.Option(help="An input that was always zero: gets a smallest scale, or is an error."),
    ] = _export_default("dead"),
    expert_input_scale: Annotated[
        Literal["layer", "expert"],
        typer.Option(
            help="Input scales of fused experts: one per layer, as engines expect, or one per expert."
        ),
    ] = _export_default("expert_input_scale"),
    fold: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="Input scales that AWQ found: folded into the weights before, so that engines load a plain "
            "checkpoint, or kept apart as pre_quant_scale where modelopt keeps them apart."
        ),
    ] = _export_default("fold"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another export that is at OUT.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Export an unfinished run; the checkpoint's report says so.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="Bytes per shard.")] = _export_default("shard_size"),
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Turns a run and its model into a quantized checkpoint in OUT; never needs calibration again.

    It streams the source tensor by tensor and writes shard by shard; nothing is in OUT until all of it is.
    The same command again writes only what is unfinished. Every policy that had to decide something is in
    OUT/export_report.json with the quantizers it touched.

    **Examples**

    `holdfast export runs/qwen3 exports/qwen3-nvfp4`

    `holdfast export runs/qwen3 exports/qwen3-fp8 --recipe fp8`

    `holdfast export runs/qwen3 exports/strict --unseen error --dead error --conflict error`
    """
    with exit_codes(debug):
        settings = ExportSettings(
            run=run,
            out=out,
            recipe=recipe,
            model=model,
            unseen=unseen,
            conflict=conflict,
            dead=dead,
            expert_input_scale=expert_input_scale,
            fold=fold,
            overwrite=overwrite,
            partial=partial,
            trust_remote_code=trust_remote_code,
            shard_size=shard_size,
        )
        _quiet(debug)
        from pipeline.progress import reporting
        from pipeline.summary import print_export

        with reporting() as progress:
            progress.stage("loading libraries")
            from stages.export.run import export

            report = export(settings, progress)
        print_export(report, out)


@app.command(epilog=EXIT_CODES)
def status(
    run: Run,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Says how far a run is, what its statistics lack and what to type next.

    Works while a calibration runs, and changes nothing.

    **Example**

    `holdfast status runs/qwen3 --json`
    """
    with exit_codes(debug):
        from pipeline.status import look, print_status

        print_status(look(run), json)


def _quiet(debug: bool) -> None:
    """The libraries' warnings are about their own interfaces; none is for the person at this command line."""
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of `holdfast` and `python -m holdfast`."""
    signal.signal(signal.SIGTERM, _terminated)
    app()
