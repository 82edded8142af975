"""Verify: every rule over every tensor of a checkpoint, and a report of it."""

from collections import Counter
from collections.abc import Mapping

from stages.engines.files import Files, read_files
from stages.engines.findings import Finding
from stages.engines.layout import layout_findings, unknown_algo
from stages.engines.modules import Inventory, take_stock
from stages.engines.standing import engine_findings
from stages.model.dequantize.source import open_source, told_of_quantized
from stages.model.folder import locate
from stages.model.skeleton import Skeleton, load_config
from stages.progress import Progress, Silent
from stages.settings import VerifySettings
from stages.verify.of_class import class_findings, skeleton_of
from stages.verify.of_source import Compared, compare
from stages.verify.plain_view import plain_view
from stages.verify.report import REPORT, VerifyReport
from stages.verify.values import value_findings
from state.durable import Disk
from state.source import Source, TensorEntry


def verify(settings: VerifySettings, progress: Progress | None = None) -> VerifyReport:
    """Look at a checkpoint, and write OUT/verify_report.json, whatever is found.

    Raises:
        InputError: there is no checkpoint, or none in a layout that is known; or the source can't be read.
    """
    progress = progress or Silent()
    report = examine(settings, progress)
    Disk().publish(settings.out / REPORT, report.encode())
    return report


def examine(settings: VerifySettings, progress: Progress) -> VerifyReport:
    """As `verify`, without writing anything."""
    progress.stage("verifying the checkpoint")
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
