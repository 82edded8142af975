"""Rules over scales of one value: whole tensors', inputs' and KV caches'. Read in an instant."""

import math
from collections.abc import Iterator

from stages.engines.findings import Finding
from stages.engines.judge import fused_groups
from stages.engines.modules import Inventory
from stages.model.weights import OTHER_DTYPES, TORCH_DTYPES, map_tensor
from state.source import Source, TensorEntry


def scalar_findings(source: Source, inventory: Inventory) -> Iterator[Finding]:
    """All that is wrong with scales of one value, and with those that fused linears share."""
    for module in inventory.quantized.values():
        for leaf in module.algo.leaves if module.algo is not None else ():
            if leaf.role == "scalar" and (entry := module.tensors.get(leaf.name)) is not None:
                yield from scale_findings(source, entry)
    for name in inventory.kv:
        yield from scale_findings(source, source.tensors[name])
    yield from shared_findings(source, inventory)


def scale_findings(source: Source, entry: TensorEntry) -> Iterator[Finding]:
    """A scale that is not finite and above 0, or a vector that holds one."""
    if entry.dtype not in TORCH_DTYPES and entry.dtype not in OTHER_DTYPES:
        return
    values = map_tensor(source, entry.name).float().reshape(-1)
    bad = ~(values.isfinite() & (values > 0))
    if bad.any():
        first = values[bad][0].item()
        more = f", and {int(bad.sum()) - 1} more of {len(values)}" if int(bad.sum()) > 1 else ""
        yield Finding("scale-value", entry.name, f"is {first:g}{more}; it must be finite and above 0")


def shared_findings(source: Source, inventory: Inventory) -> Iterator[Finding]:
    """Scales of which an engine keeps one for several linears."""
    for group in fused_groups(inventory.quantized):
        algos = {inventory.quantized[member].algo for member in group}
        algo = algos.pop()
        if algos or algo is None:
            continue
        for leaf in algo.equal:
            found = {
                member: _value(source, entry)
                for member in group
                if (entry := inventory.quantized[member].tensors.get(leaf)) is not None
            }
            if len(set(found.values())) > 1:
                said = ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in found.items())
                yield Finding(
                    "fused-scales", group[0], f"{leaf} differs in a group that engines run as one: {said}"
                )


def _value(source: Source, entry: TensorEntry) -> float:
    values = map_tensor(source, entry.name).float().reshape(-1)
    return values[0].item() if len(values) else math.nan
