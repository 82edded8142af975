"""What an export is made from, and whether the source at hand is the one the run was calibrated with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from stages.export.unify import Policies
from stages.export.units import Shard
from stages.model.folder import tokenizer_digests
from stages.recipe.recipes import Recipe
from stages.recipe.solvers import Solver
from state.errors import Difference, IdentityMismatch
from state.identity import digest_json, flatten
from state.objects import ZARR
from state.reader import Calibration
from state.record import RunRecord
from state.source import Source

PACKAGES = ("holdfast", "nvidia-modelopt", "torch", "transformers")
"""Those whose version may change what is written."""


def require_same_source(folder: Path, source: Source, config: PretrainedConfig, record: RunRecord) -> None:
    """Compare all but the tensors' bytes with the run's identity; those are compared as they are read.

    Config fields that only one of two transformers versions knows are passed over. Raises IdentityMismatch
    naming every difference.
    """
    recorded_shapes = {name: text.partition(" ")[0] for name, text in record.identity.tensors.items()}
    shapes = {
        name: f"{entry.dtype}[{','.join(map(str, entry.shape))}]" for name, entry in source.tensors.items()
    }
    refuse_other_tensors(source, recorded_shapes, shapes)
    fields = flatten(json.loads(config.to_json_string(use_diff=False)))
    recorded_fields = record.identity.config
    if record.environment.transformers != version("transformers"):
        fields = {name: value for name, value in fields.items() if name in recorded_fields}
        recorded_fields = {name: value for name, value in recorded_fields.items() if name in fields}
    found = _differences("config", recorded_fields, fields)
    found += _differences("tokenizer", record.identity.tokenizer, tokenizer_digests(folder))
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
    record = run.record
    return {
        "run.tensors": record.identity.tensors_digest,
        "run.config": digest_json(record.identity.config),
        "run.tokens": record.identity.tokens,
        "run.statistics": digest_json(sorted(statistics.items())),
        "run.finished": str(run.head.finished),
        "recipe": digest_json(_text_keys([recipe.quant_cfg, recipe.algorithm, recipe.algorithm_options])),
        "solver": "none" if solver is None else solver.id,
        "solutions": digest_json(sorted(solutions.items())),
        "fold": fold,
        **{f"policy.{name}": value for name, value in asdict(policies).items()},
        "dtype": dtype,
        "layout": digest_json(layout),
        "carried": digest_json(sorted(carried.items())),
        **{f"version.{package}": version(package) for package in PACKAGES},
    }


def _text_keys(value: Any) -> Any:
    """The value with text keys: recipes name axes by number (`block_sizes: {-1: 16}`), unsortable."""
    if isinstance(value, Mapping):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list | tuple) else value


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
