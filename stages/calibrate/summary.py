"""What a finished calibration says about itself, computed from its statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from state.layout import Layout
from state.statistics import FEW_TOKENS


@dataclass(frozen=True)
class Coverage:
    """What was observed, and what the text did not reach.

    sites: observed places, aliases included. experts: of all layers. unseen, few: experts that saw no, or
    fewer than FEW_TOKENS, tokens. dead_channels: channels observed and always zero. non_finite: sites with an
    infinite or undefined value.
    """

    sites: int = 0
    experts: int = 0
    unseen: tuple[str, ...] = ()
    few: tuple[str, ...] = ()
    dead_channels: int = 0
    non_finite: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A finished calibration.

    tokens, seconds: of this process alone. recipe: asked for now. remembered: the one the run began with,
    which is export's default.
    """

    run: Path
    recipe: str
    remembered: str
    tokens: int
    seconds: float
    already_finished: bool
    coverage: Coverage


def measure_coverage(layout: Layout, arrays: Mapping[str, np.ndarray]) -> Coverage:
    """Coverage of a generation's statistics. A captured run counts no tokens, so it lists no experts."""
    seen: dict[str, int] = {}  # expert → the most tokens that any of its inputs saw
    non_finite: list[str] = []
    sites = dead = 0
    for array in layout.arrays:
        if array.role == "weight":
            continue
        names = list(array.sites())
        amax = arrays[f"amax/{array.key}"].reshape(len(names), -1)
        aliases = sum(target == f"{array.pattern}.{array.role}" for target in layout.aliases.values())
        sites += len(names) * (1 + aliases)
        dead += int((amax == 0).sum())
        infinite = np.flatnonzero(np.isinf(amax).any(axis=1))
        non_finite += [f"{names[number].module} ({names[number].role})" for number in infinite]
        if array.experts is not None and "tokens" in array.statistics:
            for site, tokens in zip(names, arrays[f"tokens/{array.key}"].reshape(-1), strict=True):
                expert = site.module.rpartition(".")[0]
                seen[expert] = max(seen.get(expert, 0), int(tokens))
    return Coverage(
        sites=sites,
        experts=len(seen),
        unseen=tuple(name for name, tokens in seen.items() if tokens == 0),
        few=tuple(name for name, tokens in seen.items() if 0 < tokens < FEW_TOKENS),
        dead_channels=dead,
        non_finite=tuple(non_finite),
    )
