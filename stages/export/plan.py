"""All that is decided about an export before the first byte is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import state
from stages.commands import calibrate_command
from stages.export.apply_solver import Subject, apply_solver
from stages.export.config import carried_files, config_files, with_pre_quant_scale
from stages.export.decide import decide
from stages.export.folder import REPORT
from stages.export.observed import Observed, observed
from stages.export.provenance import export_identity, require_same_source
from stages.export.report import ExportReport, describe
from stages.export.shards import index
from stages.export.tensors import Ingredients
from stages.export.unify import Policies
from stages.export.units import Shard, assign_shards, check_engine_rules, check_widths, plan_units
from stages.model.folder import locate
from stages.model.skeleton import Skeleton, load_config, refuse_quantized
from stages.model.weights import TORCH_DTYPES
from stages.progress import Progress
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import Recipe, resolve
from stages.recipe.solvers import solver_of
from stages.settings import ExportSettings
from state.errors import InputError
from state.identity import digest
from state.reader import Calibration
from state.source import Source

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class ExportPlan:
    """All that is known before the first byte: shards, what they are made from, small files, the report."""

    shards: tuple[Shard, ...]
    ingredients: Ingredients
    files: Mapping[str, bytes]
    identity: Mapping[str, str]
    report: ExportReport


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
    solver = solver_of(quantizers)
    check_engine_rules(quantizers, run.layout.groups("engine_fused"), source.tensors)
    dtype = _dtype(skeleton, source)
    found = observed(run, quantizers)
    _check_widths(found, source)
    applied = apply_solver(solver, Subject(run, source, skeleton, quantizers, dtype), found, settings.fold)
    policies = Policies(settings.unseen, settings.conflict, settings.dead, settings.expert_input_scale)
    decisions = decide(
        applied.found,
        quantizers,
        run.layout.groups("same_input"),
        run.layout.groups("engine_fused"),
        policies,
    )
    written = applied.rescaling.written
    units = plan_units(source.tensors, quantizers, decisions.weights_only, written, SAFETENSORS_DTYPES[dtype])
    shards = assign_shards(units, settings.shard_size)
    hf_quant_config = quantizers.hf_quant_config
    if applied.solved is not None:
        hf_quant_config = with_pre_quant_scale(hf_quant_config, bool(applied.rescaling.separate))
    small = _small_files(folder, skeleton, hf_quant_config, dtype, shards)
    source_bytes = sum(entry.nbytes for entry in source.tensors.values())
    report = describe(
        _public_name(recipe),
        shards,
        len(quantizers.kv),
        source_bytes,
        (*decisions.uses, *applied.policies),
        not run.head.finished,
        None if solver is None else solver.id,
        applied.kept_at_one,
    )
    small[REPORT] = report.encode()
    carried = {name: digest(data) for name, data in small.items() if name != REPORT}
    identity = export_identity(run, recipe, policies, solver, settings.fold, shards, str(dtype), carried)
    ingredients = Ingredients(
        source,
        run.record.identity.tensors,
        found.weights,
        decisions.scales,
        applied.rescaling,
        applied.solved,
    )
    return ExportPlan(tuple(shards), ingredients, small, identity, report)


def _check_widths(found: Observed, source: Source) -> None:
    widths = {
        name.removesuffix(".input_quantizer"): amax.shape[0]
        for name, amax in found.inputs.items()
        if amax.dim() == 1
    }
    check_widths(widths, source.tensors)


def _small_files(
    folder: Path,
    skeleton: Skeleton,
    hf_quant_config: dict[str, Any],
    dtype: torch.dtype,
    shards: Sequence[Shard],
) -> dict[str, bytes]:
    """Every file that is no shard, by name; what the export makes itself wins over what the source holds."""
    files = {name: (folder / name).read_bytes() for name in carried_files(folder)}
    files |= config_files(skeleton, hf_quant_config, str(dtype).removeprefix("torch."))
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
    if run.head.finished:
        return
    cursor, recorded = run.head.cursor, run.record.settings
    finish = f"finish it with: {calibrate_command({**recorded, 'run': str(run.path)})}"
    if cursor.layer:
        raise InputError(
            f"{settings.run} is unfinished: it holds the layers before {cursor.layer} and nothing of those "
            f"behind; {finish}"
        )
    if not settings.partial:
        raise InputError(
            f"{settings.run} is unfinished: it holds {cursor.batch} batches; {finish}, or export what there "
            "is with --partial"
        )
