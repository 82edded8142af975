"""Which engines load what an export will write, known before its first byte."""

import json
from collections.abc import Collection, Mapping, Sequence

from stages.engines import ENGINES, SHOWN, Engine
from stages.engines.exclusion import matrix_of
from stages.engines.judge import faults, loads
from stages.engines.stated import Stated, inline
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.settings import Target
from state.errors import InputError


def engines_of(
    quantizers: QuantizerPlan,
    configuration: Mapping[str, str],
    weights_only: Collection[str],
    plain: Mapping[str, Sequence[int]],
) -> dict[Engine, list[str]]:
    """Engine → why it does not load the checkpoint, or not rightly; empty where it does.

    Args:
        configuration: the checkpoint's configuration files, name → text. weights_only: modules that a policy
            leaves without an input scale. plain: tensor that stays as it is → its shape.
    """
    written = json.loads(configuration["config.json"]).get("quantization_config")
    stated = inline(written) if written is not None else Stated(None, None, (), None)
    algos = {
        module: algo
        for module in quantizers.weights
        if module not in quantizers.together and (algo := stated.algo_of(module)) is not None
    }
    linears = {module for name, shape in plain.items() if (module := matrix_of(name, shape)) is not None}
    reasons = loads(stated, algos, sorted(set(quantizers.together.values())))
    for engine in ENGINES:
        for fault in faults(engine, stated, list(algos), sorted(linears))[:1]:
            reasons[engine].append(f"takes {fault.module} for something else: {fault.says}")
        if weights_only:
            needs = f"needs an input scale for {min(weights_only)} ({len(weights_only)} such)"
            reasons[engine].append(f"{needs}; give --unseen layer")
    return reasons


def refuse_target(target: Target, reasons: Mapping[Engine, Sequence[str]]) -> None:
    """Raise InputError where the engine that was asked for does not load the checkpoint."""
    if target == "any" or not reasons[target]:
        return
    others = [engine for engine in ENGINES if not reasons[engine]]
    instead = f"; without --target it is exported for {told(reasons)}" if others else ""
    raise InputError(f"{SHOWN[target]} {'; it '.join(reasons[target])}{instead}")


def told(reasons: Mapping[Engine, Sequence[str]]) -> str:
    """For people: the engines that load a checkpoint."""
    return ", ".join(SHOWN[engine] for engine in ENGINES if not reasons[engine]) or "none that is known"
