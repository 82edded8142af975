"""The command line: quantize, calibrate, export, verify, recipes, status, check and repair.

Stages are imported when a command needs them: torch takes seconds, and all but the first four do without.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.options import Debug, quiet, takes
from pipeline.outcome import exit_codes
from stages.settings import CalibrateSettings, ExportSettings, QuantizeSettings, VerifySettings

EXIT_CODES = """
Exit codes: 0 done (or done before) · 2 something given is wrong or missing · 3 stored work is of other
content, settings or environment · 4 a stored object is damaged · 75 stopped, progress is committed: the same
command goes on.
"""

app = typer.Typer(
    help="Quantizes Hugging Face models after training, so that calibration can't be lost.\n\n"
    "calibrate measures a model once and commits as it goes; export turns the run into a checkpoint, in as "
    "many formats as you like; quantize is both in one; recipes lists them; verify proves that engines read "
    "it rightly; status looks at a run, also while it is being made; check verifies one, and repair mends "
    "it.\n\n" + EXIT_CODES,
    epilog="Killed, out of space, out of time? Give the same command again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=EXIT_CODES)
@takes(QuantizeSettings)
def quantize(settings: QuantizeSettings) -> None:
    """Calibrates and exports in one go: from a model and text to a quantized checkpoint in OUT.

    The run is kept beside OUT, as OUT-run unless --run names another one, and serves other formats: give it
    to export, or to this command again with another OUT. What export would refuse is refused before anything
    is measured, as far as it can be known. Killed or stopped in either stage, the same command goes on.

    **Examples**

    `holdfast quantize Qwen/Qwen3-30B-A3B chats.jsonl exports/qwen3-nvfp4`

    `holdfast quantize ./model 'texts/*.txt' exports/mine-awq --recipe nvfp4_awq_full --run runs/mine`

    `holdfast export exports/qwen3-nvfp4-run exports/qwen3-fp8 --recipe fp8`
    """
    from pipeline.progress import reporting
    from pipeline.summary import print_quantized

    with reporting() as progress:
        progress.stage("loading libraries")
        from stages.quantize import quantize

        done = quantize(settings, progress)
    print_quantized(done, settings)


@app.command(epilog=EXIT_CODES)
@takes(CalibrateSettings)
def calibrate(settings: CalibrateSettings) -> None:
    """Measures a model on text, and keeps what it measures in RUN.

    The forward is unquantized; for every site and channel the largest and summed |x| are kept, so one run
    serves FP8 and NVFP4 alike. A recipe with AWQ or GPTQ adds its solutions to the run, also to a finished
    one. Commits come every 30 s. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 commit, too, and so does --stop-after.
    The same command again goes on where it stopped; a finished run says so and does nothing.

    **Examples**

    `holdfast calibrate Qwen/Qwen3-30B-A3B chats.jsonl runs/qwen3`

    `holdfast calibrate ./model 'texts/*.txt' runs/mine --recipe fp8 --samples 256 --seq 4096`

    `holdfast calibrate Qwen/Qwen3-30B-A3B chats.jsonl runs/qwen3 --recipe nvfp4_awq_full`

    `holdfast calibrate ./model wikitext:wikitext-2-raw-v1 runs/wiki --split test --device cuda:1`
    """
    from pipeline.progress import reporting
    from pipeline.summary import print_calibration

    with reporting() as progress:
        progress.stage("loading libraries")
        from stages.calibrate.run import calibrate

        summary = calibrate(settings, progress)
    print_calibration(summary)


@app.command(epilog=EXIT_CODES)
@takes(ExportSettings)
def export(settings: ExportSettings) -> None:
    """Turns a run and its model into a quantized checkpoint in OUT; never needs calibration again.

    It streams the source tensor by tensor and writes shard by shard; nothing is in OUT until all of it is.
    The same command again writes only what is unfinished. Every policy that had to decide something is in
    OUT/export_report.json with the quantizers it touched.

    **Examples**

    `holdfast export runs/qwen3 exports/qwen3-nvfp4`

    `holdfast export runs/qwen3 exports/qwen3-fp8 --recipe fp8`

    `holdfast export runs/qwen3 exports/strict --unseen error --dead error --conflict error`

    `holdfast export runs/qwen3 exports/qwen3-nvfp4-mse --recipe nvfp4 --scales mse`

    `holdfast export runs/qwen3 exports/qwen3-nvfp4 --dry-run`
    """
    from pipeline.progress import reporting
    from pipeline.summary import print_export

    with reporting() as progress:
        progress.stage("loading libraries")
        from stages.export.run import export

        report = export(settings, progress)
    print_export(report, settings.out)


@app.command(epilog=EXIT_CODES)
def recipes(
    model: Annotated[
        str | None,
        typer.Option("--model", help="Judge them on this model: a folder or a hub id.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON array instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Lists every recipe that modelopt ships: served or why not, bits per weight, what it needs of a run.

    Without a model they are judged on a small mixture of experts, and rules for modules that it does not
    have, such as Mamba's, on its attention. A run serves every recipe that needs nothing or channel
    statistics; a solver pass is added by giving the recipe to calibrate.

    **Examples**

    `holdfast recipes`

    `holdfast recipes --model Qwen/Qwen3-30B-A3B --json`
    """
    with exit_codes(debug):
        quiet(debug)
        from pipeline.progress import reporting
        from pipeline.recipes import look_through, print_recipes

        with reporting() as progress:
            progress.stage("loading libraries")
            found = look_through(model, progress)
        print_recipes(found, json)


@app.command(epilog=EXIT_CODES)
@takes(VerifySettings)
def verify(settings: VerifySettings) -> None:
    """Reads every tensor of a checkpoint, whoever wrote it, and says whether engines read it rightly: exit 0
    if nothing is wrong, 2 naming what is.

    What vLLM, SGLang and TensorRT-LLM ask a checkpoint for, and how they read it, is written down as rules;
    nothing of them is installed or run. The report is OUT/verify_report.json; nothing else is changed.

    **Examples**

    `holdfast verify exports/qwen3-nvfp4`

    `holdfast verify exports/qwen3-nvfp4 --target vllm`

    `holdfast verify exports/qwen3-nvfp4 --numeric --model Qwen/Qwen3-30B-A3B --data held-out.jsonl`
    """
    from pipeline.progress import reporting
    from pipeline.verify import print_verification

    with reporting() as progress:
        progress.stage("loading libraries")
        from stages.measure.run import measure
        from stages.verify.run import verify

        report = verify(settings, progress, measure)
    print_verification(report, settings.out)


@app.command(epilog=EXIT_CODES)
def status(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
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


@app.command(epilog=EXIT_CODES)
def check(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Reads every file of a run and says what is whole: exit 0 if all is, 4 naming what is damaged.

    Works while a calibration runs, and changes nothing.

    **Example**

    `holdfast check runs/qwen3`
    """
    with exit_codes(debug):
        from pipeline.check import check

        check(run)


@app.command(epilog=EXIT_CODES)
def repair(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Makes lost heads of a run again from what is whole, sets aside what is damaged or stays unreadable,
    and says what has to be made again.

    Nothing is deleted: what is set aside lies in RUN/set-aside/TIME.

    **Example**

    `holdfast repair runs/qwen3`
    """
    with exit_codes(debug):
        from pipeline.repair import repair

        repair(run)
