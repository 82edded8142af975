"""What an export is made from, and whether the source at hand is the one the run was calibrated with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from stages.export.units import Shard
from stages.model.folder import recorded_code, tokenizer_digests
from stages.recipe.recipes import Recipe
from stages.recipe.solvers import Solver
from stages.unify import Policies
from state.errors import Difference, IdentityMismatch
from state.identity import Identity, digest_json
from state.objects import ZARR
from state.reader import Calibration
from state.record import RunRecord
from state.source import Source

PACKAGES = ("holdfast", "nvidia-modelopt", "torch", "transformers")
"""Those whose version may change what is written."""

UNRECORDED = "tekken.json"
"""A file of the tokenizer that runs of an older Holdfast do not name; theirs can't be compared."""


def require_same_shapes(source: Source, record: RunRecord) -> None:
    """Raise IdentityMismatch naming every tensor whose dtype or shape is not the run's.

    The bytes are compared as they are read.
    """
    recorded = {name: text.partition(" ")[0] for name, text in record.identity.tensors.items()}
    shapes = {
        name: f"{entry.dtype}[{','.join(map(str, entry.shape))}]" for name, entry in source.stored.items()
    }
    refuse_other_tensors(source, recorded, shapes)


def require_same_config(folder: Path, config: Mapping[str, str], record: RunRecord) -> None:
    """Compare the flattened configuration, the tokenizer and the model's own code in `folder` with the run's
    identity.

    Config fields that only one of two transformers versions knows are passed over. Raises IdentityMismatch
    naming every difference.
    """
    fields, recorded = dict(config), record.identity.config
    if record.environment.transformers != version("transformers"):
        fields = {name: value for name, value in fields.items() if name in recorded}
        recorded = {name: value for name, value in recorded.items() if name in fields}
    found = _differences("config", recorded, fields)
    tokenizer = tokenizer_digests(folder)
    if UNRECORDED not in record.identity.tokenizer:
        tokenizer.pop(UNRECORDED, None)
    found += _differences("tokenizer", record.identity.tokenizer, tokenizer)
    code = record.identity.code
    found += _differences("code", code, recorded_code(folder, code))
    _refuse(folder, found)


def refuse_other_tensors(source: Source, recorded: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise IdentityMismatch naming every tensor whose description differs."""
    _refuse(source.folder, _differences("tensors", recorded, current))


def export_identity(
    run: Calibration,
    recipe: Recipe,
    policies: Policies,
    solver: Solver | None,
    fold: str,
    shards: Sequence[Shard],
    dtype: str,
    carried: Mapping[str, str],
) -> dict[str, str]:
    """Field → value of everything the checkpoint's bytes depend on.

    Statistics count without their generation's number, which depends on how often the run was interrupted.
    """
    prefix = f"{ZARR}/{run.head.generation}/"
    statistics = {
        path.removeprefix(prefix): content
        for path, content in run.head.objects.items()
        if path.startswith(prefix)
    }
    solutions = {}
    if solver is not None:
        prefix = f"{ZARR}/solutions/{solver.id}/"
        solutions = {path: seen for path, seen in run.head.objects.items() if path.startswith(prefix)}
    layout = [(shard.file, [(spec.name, spec.dtype, spec.shape) for spec in shard.specs]) for shard in shards]
    return {
        **content_identity(run.record.identity),
        "run.statistics": digest_json(sorted(statistics.items())),
        "run.finished": str(run.head.finished),
        **asked_identity(recipe, policies, fold),
        "solver": "none" if solver is None else solver.id,
        "solutions": digest_json(sorted(solutions.items())),
        "dtype": dtype,
        "layout": digest_json(layout),
        "carried": digest_json(sorted(carried.items())),
    }


def asked_identity(recipe: Recipe, policies: Policies, fold: str) -> dict[str, str]:
    """The fields that are known from what a person asks for, with the libraries at hand."""
    return {
        "recipe": recipe.digest,
        "fold": fold,
        **{f"policy.{name}": value for name, value in asdict(policies).items()},
        **{f"version.{package}": version(package) for package in PACKAGES},
    }


def content_identity(identity: Identity) -> dict[str, str]:
    """The fields that are known from what a run is calibrated with, before it is."""
    return {
        "run.tensors": identity.tensors_digest,
        "run.config": digest_json(identity.config),
        "run.tokens": identity.tokens,
    }


def _differences(kind: str, recorded: Mapping[str, str], current: Mapping[str, str]) -> list[Difference]:
    return [
        Difference(f"{kind}.{name}", recorded.get(name), current.get(name))
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    ]


def _refuse(folder: Path, found: Sequence[Difference]) -> None:
    if found:
        lines = [f"{folder} is not the model this run was calibrated with; {len(found)} field(s) differ:"]
        lines += [f"  {difference}" for difference in found]
        lines.append("give the right folder as --model, or calibrate this model")
        raise IdentityMismatch("\n".join(lines), found)
