"""Verify: every rule over every tensor of a checkpoint, and a report of it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite

from stages.engines.files import UNFINISHED, Files, read_files
from stages.engines.findings import Finding, without_path
from stages.engines.layout import layout_findings, unknown_algo
from stages.engines.modules import Inventory, take_stock
from stages.engines.standing import engine_findings
from stages.model.dequantize.source import open_source, told_of_quantized
from stages.model.folder import locate
from stages.model.skeleton import Skeleton, load_config
from stages.progress import Progress, Silent
from stages.settings import VerifySettings
from stages.verify.numbers import Numbers
from stages.verify.of_class import class_findings, skeleton_of
from stages.verify.of_source import Compared, compare
from stages.verify.plain_view import plain_view
from stages.verify.report import REPORT, VerifyReport
from stages.verify.values import value_findings
from state.durable import Disk
from state.errors import InputError
from state.source import Source, TensorEntry

Measure = Callable[[VerifySettings, Progress], Numbers]


def verify(
    settings: VerifySettings, progress: Progress | None = None, measure: Measure | None = None
) -> VerifyReport:
    """Look at a checkpoint, and write OUT/verify_report.json, whatever is found.

    Args:
        measure: what `--numeric` is done by (stages/measure), where it is asked for.

    Raises:
        InputError: there is no checkpoint, or none in a layout that is known; or the source can't be read; or
            numbers are asked for without what they take.
    """
    progress = progress or Silent()
    if settings.numeric:
        require_text(settings)
    report = examine(settings, progress)
    if settings.numeric and measure is not None:
        report = _with_numbers(report, settings, progress, measure)
    Disk().publish(settings.out / REPORT, report.encode())
    return report


def require_text(settings: VerifySettings) -> None:
    """Raise InputError where numbers are asked for without a model to compare with, or text to do it on."""
    lacking = "--model" if settings.model is None else "--data" if settings.data is None else None
    if lacking is not None:
        raise InputError(
            f"--numeric needs {lacking}: it runs the checkpoint and the model it was made from on text that "
            "calibration has not seen; such as --model MODEL --data held-out.jsonl"
        )


def _with_numbers(
    report: VerifyReport, settings: VerifySettings, progress: Progress, measure: Measure
) -> VerifyReport:
    """The report with numbers; without them, and saying why, where a damaged checkpoint gives none."""
    try:
        numbers = measure(settings, progress)
    except InputError as error:
        if report.whole:
            raise
        why = f"numbers: {without_path(settings.out, str(error))}"
        return replace(report, left_out=(*report.left_out, why))
    limit, found = settings.max_loss_increase, list(report.findings)
    if not isfinite(numbers.loss):
        found.append(Finding("loss-increase", "loss", f"is {numbers.loss}"))
    elif limit is not None and numbers.increase > limit:
        says = f"is {numbers.increase:.4f} nats a token above the source's {numbers.source_loss:.4f}"
        found.append(Finding("loss-increase", "loss", f"{says}, and {limit:g} are allowed"))
    left_out = (*report.left_out, *numbers.left_out)
    return replace(report, findings=tuple(found), left_out=left_out, numbers=numbers)


def examine(settings: VerifySettings, progress: Progress) -> VerifyReport:
    """As `verify`, without writing anything."""
    progress.stage("verifying the checkpoint")
    if (settings.out / UNFINISHED).exists():
        raise InputError(f"{settings.out} is an unfinished export; give its command again, then verify")
    files = read_files(settings.out)
    if files.source is None or files.stated is None:
        return _unread(settings, files)
    source, stated = files.source, files.stated
    inventory = take_stock(source.tensors, stated)
    plain = plain_view(source.tensors, inventory)
    findings: list[Finding] = [*files.findings, *unknown_algo(stated)]
    left_out = []
    skeleton = skeleton_of(settings.out, plain, settings.trust_remote_code)
    if isinstance(skeleton, str):
        left_out.append(f"whether tensors are missing that only the model's class knows of: {skeleton}")
    else:
        findings += class_findings(skeleton, plain)
        inventory = take_stock(source.tensors, stated, skeleton.embeddings)
    findings += layout_findings(source.tensors, stated, inventory, files.layers)
    reasons, wrong = engine_findings(settings.target, stated, inventory)
    findings += wrong
    nbytes = sum(entry.nbytes for entry in source.tensors.values())
    progress.start("reading values", total=nbytes, unit="bytes")
    findings += value_findings(source, inventory, progress)
    progress.finish()
    if settings.model is None:
        left_out.append("whether weights are the source's: give it as --model")
    else:
        compared = _beside_source(settings, settings.model, source, inventory, plain, progress)
        findings += compared.findings
        left_out += compared.left_out
    formats = Counter(module.algo.name for module in inventory.quantized.values() if module.algo is not None)
    return VerifyReport(
        settings.target,
        stated.algo,
        stated.kv,
        dict(sorted(formats.items())),
        reasons,
        len(source.tensors),
        nbytes,
        tuple(dict.fromkeys(findings)),
        tuple(left_out),
    )


def _beside_source(
    settings: VerifySettings,
    model: str,
    checkpoint: Source,
    inventory: Inventory,
    plain: Mapping[str, TensorEntry],
    progress: Progress,
) -> Compared:
    folder = locate(model, settings.revision, progress)
    source = open_source(folder)
    for note in told_of_quantized(source):
        progress.note(note)
    config = load_config(folder, settings.trust_remote_code)
    skeleton = Skeleton(config, source.tensors, settings.trust_remote_code)
    nbytes = sum(entry.nbytes for entry in checkpoint.tensors.values())
    progress.start("comparing with the source", total=nbytes, unit="bytes")
    compared = compare(checkpoint, inventory, plain, source, skeleton, progress)
    progress.finish()
    return compared


def _unread(settings: VerifySettings, files: Files) -> VerifyReport:
    """The report of a checkpoint whose headers or configuration can't be read."""
    left = "tensors were not looked at: the files or the configuration can't be read"
    algo, kv = (None, None) if files.stated is None else (files.stated.algo, files.stated.kv)
    return VerifyReport(settings.target, algo, kv, {}, {}, 0, 0, files.findings, (left,))
