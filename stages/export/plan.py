"""All that is decided about an export before the first byte is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stages.commands import calibrate_command
from stages.export.apply_solver import Subject, apply_solver
from stages.export.carried import carried_files
from stages.export.cast import Cast, cast_of
from stages.export.decide import decide
from stages.export.observed import Observed, observed
from stages.export.provenance import export_identity, require_same_config, require_same_shapes
from stages.export.records import REPORT
from stages.export.report import ExportReport, describe
from stages.export.scale_choice import uses, with_scales
from stages.export.shards import index
from stages.export.solved_inputs import not_as_solved
from stages.export.target import engines_of, refuse_target
from stages.export.tensors import Ingredients
from stages.export.units import Shard, assign_shards, check_engine_rules, check_widths, plan_units
from stages.model.cast_source import told_of_cast
from stages.model.dequantize.source import open_source, told_of_quantized
from stages.model.folder import locate
from stages.model.matrices import StoredMatrix
from stages.model.weights import TORCH_DTYPES
from stages.progress import Progress
from stages.recipe.kept_plans import keep_plan, kept_plan
from stages.recipe.model_plan import ModelPlan, make_plan
from stages.recipe.recipes import Recipe
from stages.recipe.solvers import solver_of
from stages.settings import ExportSettings
from stages.unify import Policies
from state.errors import InputError
from state.identity import digest
from state.reader import Calibration, open_run
from state.source import Source

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class ExportPlan:
    """All that is known before the first byte: shards, what they are made from, small files, the report.

    weights_only: modules that a policy leaves without an input scale.
    """

    shards: tuple[Shard, ...]
    ingredients: Ingredients
    files: Mapping[str, bytes]
    identity: Mapping[str, str]
    report: ExportReport
    weights_only: frozenset[str]


def plan_export(settings: ExportSettings, progress: Progress) -> ExportPlan:
    """Decide everything about an export and validate it; writes nothing."""
    progress.stage("planning the export")
    run = open_run(settings.run)
    for note in run.notes:
        progress.warn(note)
    _refuse_unfinished(run, settings)
    model, revision = (
        settings.model or run.record.source.model,
        None if settings.model else run.record.source.revision,
    )
    folder = locate(model, revision, progress)
    source = open_source(folder, str(run.record.settings.get("dtype", "auto")))
    for note in told_of_quantized(source) + told_of_cast(source):
        progress.note(note)
    require_same_shapes(source, run.record)
    plan = _model_plan(settings, run, folder, source)
    require_same_config(folder, plan.config, run.record)
    recipe, solver = plan.quantizers.recipe, solver_of(plan.quantizers)
    cast_asked = settings.mxfp4_scale == "cast"
    quantizers, scales = with_scales(plan.quantizers, settings.scales, solver, cast_asked)
    plan = replace(plan, quantizers=quantizers)
    check_engine_rules(quantizers, run.layout.groups("engine_fused"), source.tensors)
    found = observed(run, quantizers)
    _check_widths(found, plan.matrices, source)
    subject = Subject(run, source, plan)
    applied = apply_solver(solver, subject, found, settings.fold)
    cast = Cast()
    if cast_asked:
        cast = cast_of(source, plan.matrices, quantizers, solver)
    policies = policies_of(settings)
    groups = run.layout.groups("same_input"), run.layout.groups("engine_fused")
    decisions = decide(
        replace(applied.found, weights={**applied.found.weights, **cast.amax}),
        quantizers,
        *groups,
        policies,
    )
    other_inputs = not_as_solved(solver, applied.found, quantizers, *groups, policies)
    units = plan_units(
        source.tensors,
        quantizers,
        plan.matrices,
        decisions.weights_only,
        applied.rescaling.written,
        SAFETENSORS_DTYPES[subject.dtype],
    )
    plain = {unit.source: unit.outputs[0].shape for unit in units if unit.source is not None}
    without_input = decisions.weights_only & quantizers.inputs.keys()
    engines = engines_of(quantizers, plan.files[applied.scales], without_input, plain)
    refuse_target(settings.target, engines)
    shards = assign_shards(units, settings.shard_size)
    apart = (settings.run, settings.out)
    small = _small_files(folder, apart, plan.files[applied.scales], shards)
    source_bytes = sum(entry.nbytes for entry in source.stored.values())
    report = describe(
        _public_name(recipe),
        shards,
        tuple(quantizers.kv.values()),
        source_bytes,
        (
            *decisions.uses,
            *other_inputs,
            *applied.policies,
            *cast.uses(quantizers, decisions.scales),
            *uses(quantizers, scales),
        ),
        not run.head.finished,
        None if solver is None else solver.id,
        applied.kept_at_one,
        applied.folds,
        quantizers.left_out,
        source.quantized,
        engines,
    )
    small[REPORT] = report.encode()
    carried = {name: digest(data) for name, data in small.items() if name != REPORT}
    dtype = str(subject.dtype)
    identity = export_identity(run, recipe, policies, solver, settings.fold, shards, dtype, carried)
    if cast.amax:
        identity["mxfp4_scale"] = settings.mxfp4_scale
    if scales != "max":
        identity["scales"] = scales
    ingredients = Ingredients(
        source,
        run.record.identity.tensors,
        found.weights,
        decisions.scales,
        applied.rescaling,
        applied.solved,
        frozenset(cast.amax),
    )
    return ExportPlan(tuple(shards), ingredients, small, identity, report, without_input)


def policies_of(settings: ExportSettings) -> Policies:
    """The policies that are asked for."""
    return Policies(settings.unseen, settings.conflict, settings.dead, settings.expert_input_scale)


def _check_widths(found: Observed, matrices: Mapping[str, StoredMatrix], source: Source) -> None:
    widths = {
        name.removesuffix(".input_quantizer"): amax.shape[0]
        for name, amax in found.inputs.items()
        if amax.dim() == 1
    }
    check_widths(widths, matrices, source.tensors)


def _small_files(
    folder: Path, apart: Sequence[Path], configuration: Mapping[str, str], shards: Sequence[Shard]
) -> dict[str, bytes]:
    """Every file that is no shard, by name; what the export makes itself wins over what the source holds.

    apart: folders that are no part of the source.
    """
    files = {name: (folder / name).read_bytes() for name in carried_files(folder, apart)}
    files |= {name: text.encode() for name, text in configuration.items()}
    if len(shards) > 1:
        files["model.safetensors.index.json"] = index([(shard.file, shard.specs) for shard in shards])
    return dict(sorted(files.items()))


def _model_plan(settings: ExportSettings, run: Calibration, folder: Path, source: Source) -> ModelPlan:
    """What the run keeps of an earlier export or of its calibration, or else what transformers and modelopt
    say now; then it is kept.
    """
    recipe = settings.recipe or str(run.record.settings["recipe"])
    plan = kept_plan(settings.run, folder, source, recipe)
    if plan is None:
        plan = make_plan(folder, source, recipe, settings.trust_remote_code)
        keep_plan(settings.run, folder, source, recipe, plan)
    return plan


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
