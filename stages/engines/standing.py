"""What engines make of a checkpoint: who loads it, and what those who do would take for something else."""

from stages.engines import ENGINES, SHOWN, Engine
from stages.engines.findings import Finding
from stages.engines.judge import faults, loads
from stages.engines.modules import Inventory
from stages.engines.stated import Stated
from stages.settings import Target


def engine_findings(
    target: Target, stated: Stated, inventory: Inventory
) -> tuple[dict[Engine, list[str]], list[Finding]]:
    """Engine → why it does not load the checkpoint; and what is wrong.

    Of an engine that does not load such a checkpoint anyway nothing more is asked, unless it is the target.
    """
    reasons = loads(stated, inventory.algos, inventory.together)
    concerned = [target] if target != "any" else [engine for engine in ENGINES if not reasons[engine]]
    found = [
        fault
        for engine in concerned
        for fault in faults(engine, stated, list(inventory.algos), inventory.plain)
    ]
    merged: dict[tuple[str, str], list[int]] = {}
    for position, fault in enumerate(found):
        merged.setdefault((fault.rule, fault.module), []).append(position)
    findings = [
        Finding(rule, module, found[places[0]].says, tuple(found[place].engine for place in places))
        for (rule, module), places in merged.items()
    ]
    if target != "any":
        findings += [Finding("not-loaded", SHOWN[target], why, (target,)) for why in reasons[target]]
    return reasons, findings
