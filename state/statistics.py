"""What calibration measures at a site: one registered statistic each, with its merge rule.

NaN (-1 for counts) means never observed, 0 means observed and dead. Neither ever means "does not exist".
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FEW_TOKENS = 16
"""Under this many tokens the largest |x| of an expert says little about the next prompt."""


@dataclass(frozen=True)
class Statistic:
    """A named measurement.

    Attributes:
        name: also the name of its group in the store.
        dtype: numpy's name of the dtype.
        fill: value of a site or channel never observed.
        merge: how two partial runs combine.
        per_channel: whether it has the channel axis of its site.
    """

    name: str
    dtype: Literal["float32", "float64", "int64"]
    fill: float | int
    merge: Literal["max", "sum"]
    per_channel: bool


STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("amax", "float32", float("nan"), "max", per_channel=True),
        # float64, so that sums over any split of the tokens agree after rounding to float32.
        Statistic("abs_sum", "float64", float("nan"), "sum", per_channel=True),
        Statistic("tokens", "int64", -1, "sum", per_channel=False),
        Statistic("weight_amax", "float32", float("nan"), "max", per_channel=False),
    )
}


def empty(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of the statistic `name` in which nothing was observed."""
    statistic = STATISTICS[name]
    return np.full(shape, statistic.fill, dtype=statistic.dtype)


def merge(name: str, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Combine two partial measurements of equal shape, elementwise; what only one side observed is taken from
    it.
    """
    statistic = STATISTICS[name]
    if a.dtype != statistic.dtype or b.dtype != statistic.dtype:
        raise ValueError(f"{name} is {statistic.dtype}, got {a.dtype} and {b.dtype}")
    if a.shape != b.shape:
        raise ValueError(f"{name} of shapes {a.shape} and {b.shape} cannot be merged")
    merged = np.maximum(a, b) if statistic.merge == "max" else a + b
    result: NDArray[Any] = np.where(
        _unobserved(statistic, a), b, np.where(_unobserved(statistic, b), a, merged)
    )
    return result


def _unobserved(statistic: Statistic, values: NDArray[Any]) -> NDArray[np.bool_]:
    unobserved: NDArray[np.bool_] = values == -1 if statistic.fill == -1 else np.isnan(values)
    return unobserved
