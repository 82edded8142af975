"""Whether every observed value is a number: one that overflows must not end in a run."""

from collections.abc import Iterable, Mapping

import numpy as np

from state.layout import Layout
from state.names import Site, split_name


def first_overflow(layout: Layout, arrays: Mapping[str, np.ndarray], modules: Iterable[str]) -> Site | None:
    """The first site of a forward that saw inf or NaN; None where all saw numbers alone.

    Args:
        arrays: a snapshot of all statistics, in which a NaN that was computed is inf.
        modules: hub names of linears and experts' projections, in the model's own order. What is outside the
            layers is taken to come behind them.
    """
    found = []
    for array in layout.arrays:
        if array.role == "weight":
            continue
        amax = arrays[f"amax/{array.key}"]
        if not np.isinf(amax).any():
            continue
        sites = list(array.sites())
        rows = np.flatnonzero(np.isinf(amax).reshape(len(sites), -1).any(axis=1))
        found += [sites[row] for row in rows]
    if not found:
        return None
    place = {module: number for number, module in enumerate(modules)}
    return min(found, key=lambda site: _order(site, place))


def _order(site: Site, place: Mapping[str, int]) -> tuple[float, float]:
    """Sort key: the decoder layer, then the module. K and V come before the last linear of their attention,
    which takes its output.
    """
    layer = split_name(site.module)[1]
    if site.role == "input":
        within: float = place.get(site.module, len(place))
    else:
        own = [number for name, number in place.items() if name.rpartition(".")[0] == site.module]
        within = max(own, default=len(place)) - 0.5
    return float("inf") if layer is None else layer, within


def overflow_message(site: Site, dtype: str, command: str) -> str:
    """What a person is told.

    dtype: torch's name of what the model computes in. command: what calibrates in bfloat16.
    """
    layer = split_name(site.module)[1]
    where = "behind the layers" if layer is None else f"in layer {layer}"
    seen = f"{site.module} ({site.role}) saw inf or NaN {where}, computed in {dtype}"
    if dtype == "float16":
        return f"{seen}: the model overflows, and nothing can be made of that. Give another RUN: {command}"
    return (
        f"{seen}, which reaches as far as float32: the weights or the model's code are at fault. Compare the "
        "files with those that they are a copy of"
    )
