"""What can be refused of an export before its run is measured: hours of work must not end in a refusal that
was foreseeable. Every check but that of the run's place is one that the export makes again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.export.apply_solver import require_separable
from stages.export.carried import carried_files
from stages.export.cast import cast_of
from stages.export.folder import locked, refuse_names
from stages.export.place import Place, find_place
from stages.export.plan import policies_of
from stages.export.provenance import asked_identity, content_identity
from stages.export.scale_choice import with_scales
from stages.export.standing import Wanted, refuse_known
from stages.export.units import check_engine_rules
from stages.model.matrices import StoredMatrix
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import resolve
from stages.recipe.solvers import solver_of
from stages.settings import ExportSettings
from state.durable import Disk
from state.errors import InputError
from state.identity import Identity
from state.source import Source


def refuse_place(settings: ExportSettings, recipe: str) -> None:
    """Refuse what is known from the settings alone, and from what is at OUT.

    Args:
        recipe: the name of the recipe that will be exported.

    Raises:
        InputError: no folder can be made at OUT, it is not Holdfast's, or the run would be in it; or there is
            no such recipe.
        IdentityMismatch: OUT or OUT.partial is another export, and `overwrite` is off.
        DamagedStore: a record in them is damaged.
    """
    place = find_place(settings.out)
    _refuse_run_inside(settings.run, place)
    _refuse_other(settings, place, recipe, {})


def refuse_plan(
    settings: ExportSettings,
    source: Source,
    quantizers: QuantizerPlan,
    matrices: Mapping[str, StoredMatrix],
    engine_fused: Sequence[Sequence[str]],
    identity: Identity,
) -> None:
    """Refuse what is known from a model and a recipe's plan for it. Leaves the lock file beside OUT.

    Args:
        engine_fused: groups of hub modules that engines load as one.
        identity: of what the run is, or will be, calibrated with.

    Raises:
        InputError: an option can't be had with this recipe and model, or engines would refuse the checkpoint.
        IdentityMismatch: as `refuse_place`. RunBusy: another process is exporting to OUT.
    """
    solver, cast = solver_of(quantizers), settings.mxfp4_scale == "cast"
    with_scales(quantizers, settings.scales, solver, cast)
    if cast:
        cast_of(source, matrices, quantizers, solver)
    if settings.fold == "none" and solver is not None and solver.searches_scales:
        require_separable(solver, quantizers)
    check_engine_rules(quantizers, engine_fused, source.tensors)
    refuse_names(carried_files(source.folder, (settings.run, settings.out)))
    known = content_identity(identity) | {"solver": "none" if solver is None else solver.id}
    place = find_place(settings.out)
    with locked(place, Disk()):  # whether it can be made shows whether OUT can be written to
        _refuse_other(settings, place, quantizers.recipe.name, known)


def _refuse_run_inside(run: Path, place: Place) -> None:
    inside = run.resolve()
    for folder in (place.out, place.partial, place.new):
        if folder.resolve() in (inside, *inside.parents):
            raise InputError(
                f"the run {run} would be inside {folder}, which is the checkpoint's alone; give another --run"
            )


def _refuse_other(settings: ExportSettings, place: Place, recipe: str, known: Mapping[str, str]) -> None:
    asked = asked_identity(resolve(recipe), policies_of(settings), settings.fold)
    refuse_known(Disk(), place, Wanted({**asked, **known}, (), recipe), settings.overwrite)
