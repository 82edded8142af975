"""The report of an export: what was written, and every policy that acted with the quantizers it touched."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.engines import Engine
from stages.export.units import Shard
from stages.unify import PolicyUse


@dataclass(frozen=True)
class Needs:
    """What an export takes, in bytes: on a disk with `free` of them, and in memory above the imports."""

    disk: int
    free: int
    memory: int


@dataclass(frozen=True)
class ExportReport:
    """One export, for `export_report.json` and for the screen.

    formats: how many modules are stored in each format. tensors: output tensors, by dtype. nbytes: of tensor
    data; source_nbytes: the source's. policies: every use. partial: the run was unfinished. solver: the id of
    the solutions applied, None for `max`. kept_at_one: fold site or module whose input a solver could not
    scale → the reason. folds: module that a scale was divided out of → modules that took it in, by pattern.
    left_out: module or quantizer that the recipe names and that stays as it is → why.
    dequantized: scheme → how many of the source's weights were read from it. engines: engine → why it does
    not load the checkpoint; empty where it does.
    The remaining fields are of this process only and stay out of the file, which holds no times and no paths.
    needs: of an export that was only asked about.
    """

    recipe: str
    formats: dict[str, int]
    tensors: dict[str, int]
    nbytes: int
    source_nbytes: int
    shards: dict[str, int]
    policies: tuple[PolicyUse, ...]
    partial: bool
    solver: str | None = None
    kept_at_one: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    dequantized: Mapping[str, int] = field(default_factory=dict)
    folds: Mapping[str, Sequence[str]] = field(default_factory=dict)
    engines: Mapping[Engine, Sequence[str]] = field(default_factory=dict)
    already_finished: bool = False
    shards_written: int = 0
    shards_kept: int = 0
    seconds: float = 0.0
    needs: Needs | None = None

    def encode(self) -> bytes:
        """The bytes of `export_report.json`."""
        content: dict[str, Any] = {
            "recipe": self.recipe,
            "solver": self.solver,
            "formats": self.formats,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "source_bytes": self.source_nbytes,
            "shards": self.shards,
            "unfinished_run": self.partial,
            "policies": [
                {"policy": use.policy, "detail": use.detail, "quantizers": list(use.quantizers)}
                for use in self.policies
            ],
            "kept_at_one": dict(self.kept_at_one),
            "left_out": dict(self.left_out),
            "engines": {
                engine: {"loads": not reasons, "why_not": list(reasons)}
                for engine, reasons in self.engines.items()
            },
        }
        if self.folds:
            content["folds"] = {source: list(readers) for source, readers in self.folds.items()}
        if self.dequantized:
            content["dequantized"] = dict(self.dequantized)
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    def policy_counts(self) -> dict[str, int]:
        """Policy (`unseen=layer`) → number of quantizers it touched."""
        counts: Counter[str] = Counter()
        for use in self.policies:
            counts[use.policy] += len(use.quantizers)
        return dict(sorted(counts.items()))


def describe(
    recipe: str,
    shards: Sequence[Shard],
    kv_caches: Sequence[str],
    source_nbytes: int,
    policies: Sequence[PolicyUse],
    partial: bool,
    solver: str | None,
    kept_at_one: Mapping[str, str],
    folds: Mapping[str, Sequence[str]],
    left_out: Mapping[str, str],
    quantized: Mapping[str, str],
    engines: Mapping[Engine, Sequence[str]],
) -> ExportReport:
    """The report of a plan, before anything is written. quantized: the source's weight → its scheme."""
    units = [unit for shard in shards for unit in shard.units]
    formats = Counter(unit.format.name for unit in units if unit.format for _ in unit.matrices)
    formats += Counter(f"{cache.partition('_')[0]} kv cache" for cache in kv_caches)
    dtypes = Counter(spec.dtype for unit in units for spec in unit.outputs)
    return ExportReport(
        recipe=recipe,
        formats=dict(sorted(formats.items())),
        tensors=dict(sorted(dtypes.items())),
        nbytes=sum(shard.nbytes for shard in shards),
        source_nbytes=source_nbytes,
        shards={shard.file: shard.nbytes for shard in shards},
        policies=tuple(policies),
        partial=partial,
        solver=solver,
        kept_at_one=kept_at_one,
        folds=folds,
        left_out=left_out,
        dequantized=dict(sorted(Counter(quantized.values()).items())),
        engines=engines,
    )
