"""Export: from a run and its source to a quantized checkpoint. Plans everything, then writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch

import state
from stages.export.config import carried_files, config_files
from stages.export.decide import Decisions, decide
from stages.export.folder import ExportFolder, open_folder
from stages.export.identity import export_identity, require_same_source
from stages.export.observed import observed
from stages.export.plan import Shard, assign_shards, check_engine_rules, check_widths, plan_units
from stages.export.report import REPORT, ExportReport, describe
from stages.export.shards import encode, index
from stages.export.tensors import TensorMaker
from stages.export.unify import Policies
from stages.model_folder import locate
from stages.progress import Progress, Silent
from stages.quantizers import QuantizerPlan, plan_quantizers
from stages.recipes import Recipe, resolve
from stages.settings import ExportSettings
from stages.skeleton import Skeleton, load_config, refuse_quantized
from stages.weights import TORCH_DTYPES
from state.durable import Disk
from state.errors import InputError, OutOfSpace
from state.identity import digest
from state.reader import Calibration
from state.source import Source

WARNED = frozenset({"conflict=max", "dead=floor", "unseen=weights-only"})
"""Policies whose use may need an answer from the person."""

SLACK = 1 << 20
"""Bytes set aside for headers, journal and report when free space is checked."""


@dataclass(frozen=True)
class ExportPlan:
    """All that is known before the first byte: shards, scales, the small files, and the report."""

    run: Calibration
    source: Source
    shards: tuple[Shard, ...]
    decisions: Decisions
    dtype: torch.dtype
    files: Mapping[str, bytes]
    identity: Mapping[str, str]
    report: ExportReport


def export(
    settings: ExportSettings, progress: Progress | None = None, disk: Disk | None = None
) -> ExportReport:
    """Make the checkpoint `settings.out`, or go on making it, or find it finished and write nothing.

    Raises:
        InputError: the run is unfinished, the recipe or the source can't be served, or a policy says `error`.
        IdentityMismatch: the source is not the run's, or OUT is another export and `overwrite` is off.
        RunBusy, OutOfSpace, DamagedStore: see `open_folder` and `Disk`.
    """
    progress, disk = progress or Silent(), disk or Disk()
    started = monotonic()
    plan = plan_export(settings, progress)
    with open_folder(settings.out, plan.identity, disk, settings.overwrite) as folder:
        if folder.finished:
            progress.note(f"{settings.out} is finished already; nothing was written")
            return replace(
                plan.report,
                already_finished=True,
                shards_kept=len(plan.shards),
                seconds=monotonic() - started,
            )
        _refuse_full_disk(folder, plan, disk)
        kept = sum(shard.file in folder.journal for shard in plan.shards)
        _write(folder, plan, progress)
        folder.publish()
    _tell_policies(plan.report, progress)
    written = len(plan.shards) - kept
    return replace(plan.report, shards_written=written, shards_kept=kept, seconds=monotonic() - started)


def plan_export(settings: ExportSettings, progress: Progress) -> ExportPlan:
    """Decide everything about an export and validate it; writes nothing."""
    progress.stage("planning the export")
    run = state.open(settings.run)
    for note in run.notes:
        progress.warn(note)
    _refuse_unfinished(run, settings)
    model, revision = (
        settings.model or run.record.source.model,
        None if settings.model else run.record.source.revision,
    )
    folder = locate(model, revision, progress)
    source = Source.open(folder)
    config = load_config(folder, settings.trust_remote_code)
    refuse_quantized(config, folder)
    require_same_source(folder, source, config, run.record)
    skeleton = Skeleton(config, source.tensors, settings.trust_remote_code)
    recipe = resolve(settings.recipe or str(run.record.settings["recipe"]))
    quantizers = plan_quantizers(skeleton, recipe)
    check_engine_rules(quantizers, run.layout.groups("engine_fused"), source.tensors)
    policies = Policies(settings.unseen, settings.conflict, settings.dead, settings.expert_input_scale)
    decisions = _decide(run, quantizers, policies, source)
    shards = assign_shards(
        plan_units(source.tensors, quantizers, decisions.weights_only), settings.shard_size
    )
    dtype = _dtype(skeleton, source)
    small = _small_files(folder, skeleton, quantizers, dtype, shards)
    source_bytes = sum(entry.nbytes for entry in source.tensors.values())
    report = describe(
        _public_name(recipe), shards, len(quantizers.kv), source_bytes, decisions.uses, not run.head.finished
    )
    small[REPORT] = report.encode()
    carried = {name: digest(data) for name, data in small.items() if name != REPORT}
    identity = export_identity(run, recipe, policies, shards, str(dtype), carried)
    return ExportPlan(run, source, tuple(shards), decisions, dtype, small, identity, report)


def _decide(run: Calibration, quantizers: QuantizerPlan, policies: Policies, source: Source) -> Decisions:
    found = observed(run, quantizers)
    widths = {
        name.removesuffix(".input_quantizer"): amax.shape[0]
        for name, amax in found.inputs.items()
        if amax.dim() == 1
    }
    check_widths(widths, source.tensors)
    return decide(
        found, quantizers, run.layout.groups("same_input"), run.layout.groups("engine_fused"), policies
    )


def _write(folder: ExportFolder, plan: ExportPlan, progress: Progress) -> None:
    done = sum(shard.nbytes for shard in plan.shards if shard.file in folder.journal)
    if done:
        progress.note(f"going on: {done:,} of {plan.report.nbytes:,} bytes are written and verified")
    progress.start("writing", total=plan.report.nbytes, unit="bytes", done=done)
    for shard in plan.shards:
        if shard.file in folder.journal:
            continue
        maker = TensorMaker(plan.source, plan.run.record.identity.tensors, plan.decisions, shard, plan.dtype)
        folder.write(shard.file, encode(shard.specs, maker.make))
        progress.advance(shard.nbytes, shards=1)
    for name, data in plan.files.items():
        if name not in folder.journal:
            folder.write(name, data)
    progress.finish()


def _tell_policies(report: ExportReport, progress: Progress) -> None:
    for policy, count in report.policy_counts().items():
        tell = progress.warn if policy in WARNED else progress.note
        tell(f"policy {policy} acted on {count} quantizers; {REPORT} names them")


def _small_files(
    folder: Path, skeleton: Skeleton, quantizers: QuantizerPlan, dtype: torch.dtype, shards: Sequence[Shard]
) -> dict[str, bytes]:
    """Every file that is no shard, by name; what the export makes itself wins over what the source holds."""
    files = {name: (folder / name).read_bytes() for name in carried_files(folder)}
    files |= config_files(skeleton, quantizers.hf_quant_config, str(dtype).removeprefix("torch."))
    if len(shards) > 1:
        files["model.safetensors.index.json"] = index([(shard.file, shard.specs) for shard in shards])
    return dict(sorted(files.items()))


def _dtype(skeleton: Skeleton, source: Source) -> torch.dtype:
    """What the model computes in: its configuration's dtype, or else that of the first float tensor."""
    stated = skeleton.config.dtype
    if stated is not None:
        return getattr(torch, stated) if isinstance(stated, str) else stated
    return next(
        (TORCH_DTYPES[e.dtype] for e in source.tensors.values() if e.dtype in TORCH_DTYPES), torch.bfloat16
    )


def _public_name(recipe: Recipe) -> str:
    """The recipe's name; of a file of one's own only the last part, since a checkpoint holds no paths."""
    return Path(recipe.name).name if Path(recipe.name).is_file() else recipe.name


def _refuse_unfinished(run: Calibration, settings: ExportSettings) -> None:
    if not run.head.finished and not settings.partial:
        raise InputError(
            f"{settings.run} is unfinished (it stopped at {run.head.cursor}); give the calibrate command "
            "again to finish it, or export what there is with --partial"
        )


def _refuse_full_disk(folder: ExportFolder, plan: ExportPlan, disk: Disk) -> None:
    needed = SLACK + sum(shard.nbytes for shard in plan.shards if shard.file not in folder.journal)
    free = disk.free_bytes(folder.partial)
    if needed > free:
        raise OutOfSpace(folder.out, needed, free, "too little space")
