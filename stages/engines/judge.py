"""Which engines load a checkpoint with such modules, and which would take a module for something else.

A refusal is what an engine says itself, or what it is known to leave undone: other engines may load the
checkpoint. A fault is a contradiction between configuration and tensors, which makes the engine fail in
loading or read something else than was written.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stages.engines import ENGINES, SHOWN, Engine
from stages.engines.algos import INSTEAD, OTHERWISE, Algo, Kind, refusal
from stages.engines.exclusion import EXPERT, caught, expected_quantized
from stages.engines.kv import kv_refusal
from stages.engines.stated import Stated
from stages.model.engine_fused import ENGINE_FUSED


@dataclass(frozen=True)
class Fault:
    """A module that an engine builds otherwise than the tensors are. rule: its name, for reports."""

    rule: str
    module: str
    says: str
    engine: Engine


def kind_of(module: str) -> Kind:
    """Whether a module is an expert's projection, which engines load into all of a layer's at once."""
    return "experts" if EXPERT.fullmatch(module) else "linear"


def refusals(engine: Engine, stated: Stated, algos: Mapping[str, str], together: Iterable[str]) -> list[str]:
    """Why an engine does not load a checkpoint, each reason once; empty where it does.

    Args:
        algos: quantized module → the format that its tensors are in. together: tensors that hold the experts
            of a layer together, quantized.
    """
    found = []
    kinds = {(algo, kind_of(module), stated.group_of(module)) for module, algo in algos.items()}
    for algo, kind, size in sorted(kinds, key=str):
        if (why := refusal(engine, algo, kind, stated.mixed, size)) is not None:
            found.append(f"{why}; {INSTEAD.get(algo, OTHERWISE)}")
    if (held := next(iter(together), None)) is not None:
        found.append(f"is not known to load experts of a layer in one quantized tensor ({held}); {OTHERWISE}")
    if stated.algo is None and not algos and stated.kv is not None:
        found.append("needs a quant_algo beside that of the KV cache; choose a recipe that quantizes weights")
    if stated.kv is not None and (why := kv_refusal(engine, stated.kv)) is not None:
        found.append(f"{why}; choose a recipe with an FP8 KV cache, or none")
    return list(dict.fromkeys(found))


def faults(engine: Engine, stated: Stated, quantized: Sequence[str], plain: Sequence[str]) -> list[Fault]:
    """Modules that the list of unquantized ones makes an engine build otherwise than they are.

    Args:
        quantized: linears and experts' projections that are quantized. plain: those that are not.
    """
    name = SHOWN[engine]
    found = [
        Fault("excluded-quantized", module, f"{name} takes the entry {entry!r} for it", engine)
        for module, entry in caught(engine, quantized, stated.ignored).items()
    ]
    if stated.mixed:
        missed = [module for module in plain if stated.algo_of(module) is not None]
    else:
        missed = expected_quantized(engine, plain, stated.ignored) if quantized else []
    found += [
        Fault("not-excluded", module, f"is unquantized, and {name} builds it quantized", engine)
        for module in missed
    ]
    return found


def fused_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups that engines run as one matrix, of those modules that are there: two members or more."""
    names = set(modules)
    leaves = {group[0]: group for group in ENGINE_FUSED}
    found = []
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        members = [f"{parent}.{other}" for other in leaves.get(leaf, ()) if f"{parent}.{other}" in names]
        if len(members) > 1:
            found.append(tuple(members))
    return found


def loads(stated: Stated, algos: Mapping[str, str], together: Iterable[str] = ()) -> dict[Engine, list[str]]:
    """Engine → why it does not load such a checkpoint; empty where it does."""
    held = list(together)
    return {engine: refusals(engine, stated, algos, held) for engine in ENGINES}


def misfit(algo: Algo, rows: int, columns: int) -> str | None:
    """Why a weight `[rows, columns]` can't be in a format, as the rest of a sentence; None: it can."""
    down, across = algo.divides
    if rows % down or columns % across:
        return f"is [{rows}, {columns}], and {algo.name} needs multiples of [{down}, {across}]"
    return None
