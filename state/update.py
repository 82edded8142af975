"""What a commit adds to a run, checked before anything is written, and its form in zarr."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.head import Cursor, Head
from state.layout import Layout, SiteArray
from state.objects import ObjectWriter, array_files
from state.paths import ZARR
from state.statistics import STATISTICS

METADATA_BYTES = 1024
TOKENS_PER_CHUNK = 2**22
NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")


@dataclass(frozen=True)
class Generation:
    """All statistics at one moment.

    Attributes:
        arrays: `<statistic>/<SiteArray.key>` -> values of the statistic's dtype and the layout's shape;
            complete.
    """

    layout: Layout
    arrays: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Solution:
    """What a solver found for one layer: float or signed integer arrays by name, and JSON attributes."""

    solver_id: str
    layer: int
    arrays: Mapping[str, NDArray[np.generic]]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a commit adds.

    Attributes:
        cursor: the next thing to do.
        generation: new statistics, or None to keep the ones committed before.
        solutions: new solutions; those committed before stay.
        outdated: those (solver, layer) that do not: they were made behind what has changed; set aside.
    """

    cursor: Cursor
    finished: bool
    generation: Generation | None = None
    solutions: tuple[Solution, ...] = ()
    outdated: tuple[tuple[str, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that writing takes, about: all arrays and their metadata."""
        groups = [solution.arrays for solution in self.solutions]
        if self.generation is not None:
            groups.append(self.generation.arrays)
        return sum(values.nbytes + METADATA_BYTES for arrays in groups for values in arrays.values())


def check_update(update: Update, head: Head) -> None:
    """Check that `update` can follow `head`.

    Raises:
        ValueError: the arrays do not fit the layout, or a solution has bad names or dtypes or exists already.
    """
    if update.generation is not None:
        _check_generation(update.generation)
    names = [_solution_group(solution) for solution in update.solutions]
    for solution, group in zip(update.solutions, names, strict=True):
        if names.count(group) > 1 or f"{ZARR}/{group}/zarr.json" in head.objects:
            raise ValueError(f"{group} is written once and exists already")
        for name in (solution.solver_id, *solution.arrays):
            if not NODE_NAME.fullmatch(name):
                raise ValueError(f"{group}: {name!r} cannot be the name of an array or a solver")
        for name, values in solution.arrays.items():
            if values.dtype.kind not in "fi":
                raise ValueError(
                    f"{group}/{name} is {values.dtype}; floats and signed integers can be stored"
                )


def _check_generation(generation: Generation) -> None:
    expected = {
        f"{statistic}/{array.key}": (STATISTICS[statistic].dtype, array.shape(statistic))
        for array in generation.layout.arrays
        for statistic in array.statistics
    }
    if different := expected.keys() ^ generation.arrays.keys():
        raise ValueError(f"arrays and layout do not agree on {sorted(different)}")
    for name, (dtype, shape) in expected.items():
        values = generation.arrays[name]
        if values.dtype != dtype or values.shape != shape:
            raise ValueError(
                f"{name} is {values.dtype}{list(values.shape)}, the layout has {dtype}{list(shape)}"
            )


def planned_files(update: Update, group: str | None, head: Head) -> list[str]:
    """Every file that `put_update` will write, before it does."""
    files: list[str] = []
    if update.generation is not None and group is not None:
        statistics = {name for array in update.generation.layout.arrays for name in array.statistics}
        files += [f"{ZARR}/{name}/zarr.json" for name in (group, *(f"{group}/{one}" for one in statistics))]
        for array in update.generation.layout.arrays:
            for statistic in array.statistics:
                shape = array.shape(statistic)
                files += array_files(f"{group}/{statistic}/{array.key}", shape, _chunks(array, statistic))
    for solution in update.solutions:
        own = _solution_group(solution)
        groups = {"solutions", f"solutions/{solution.solver_id}", own}
        new = [f"{ZARR}/{name}/zarr.json" for name in groups]
        files += [path for path in new if path not in head.objects]
        for name, values in solution.arrays.items():
            files += array_files(f"{own}/{name}", values.shape, values.shape)
    return sorted(set(files))


def put_tokens(objects: ObjectWriter, tokens: NDArray[np.int32]) -> None:
    """Write the token matrix, int32 [windows, seq]."""
    axes = ("window", "position")
    objects.array("tokens", tokens, fill=-1, axes=axes, chunks=_token_chunks(tokens))


def token_files(tokens: NDArray[np.int32]) -> list[str]:
    """Every file that `put_tokens` will write."""
    return list(array_files("tokens", tokens.shape, _token_chunks(tokens)))


def _token_chunks(tokens: NDArray[np.int32]) -> tuple[int, int]:
    windows_per_chunk = max(1, TOKENS_PER_CHUNK // max(tokens.shape[1], 1))
    return min(windows_per_chunk, max(tokens.shape[0], 1)), tokens.shape[1]


def _chunks(array: SiteArray, statistic: str) -> tuple[int, ...]:
    """One layer of an array at a time."""
    shape = array.shape(statistic)
    return (1, *shape[1:]) if "layer" in array.axes(statistic) else shape


def put_update(objects: ObjectWriter, update: Update, group: str | None, head: Head) -> None:
    """Write the statistics of `update` to the new `group`, and its solutions; nothing refers to them yet."""
    if update.generation is not None and group is not None:
        _put_generation(objects, group, update.generation)
    for solution in update.solutions:
        _put_solution(objects, solution, head)


def _put_generation(objects: ObjectWriter, group: str, generation: Generation) -> None:
    objects.group(group, {"layout": generation.layout.model_dump(mode="json")})
    for statistic in sorted({name for array in generation.layout.arrays for name in array.statistics}):
        objects.group(f"{group}/{statistic}")
    for array in generation.layout.arrays:
        for statistic in array.statistics:
            values = generation.arrays[f"{statistic}/{array.key}"]
            objects.array(
                f"{group}/{statistic}/{array.key}",
                values,
                fill=STATISTICS[statistic].fill,
                axes=array.axes(statistic),
                chunks=_chunks(array, statistic),
                attributes={"pattern": array.pattern, "role": array.role, "layers": list(array.layers)},
            )


def _put_solution(objects: ObjectWriter, solution: Solution, head: Head) -> None:
    for parent in ("solutions", f"solutions/{solution.solver_id}"):
        if f"{ZARR}/{parent}/zarr.json" not in objects.objects.keys() | head.objects.keys():
            objects.group(parent)
    group = _solution_group(solution)
    objects.group(group, solution.attributes)
    for name, values in sorted(solution.arrays.items()):
        axes = tuple(f"axis{axis}" for axis in range(values.ndim))
        fill = np.nan if values.dtype.kind == "f" else -1
        objects.array(f"{group}/{name}", values, fill=fill, axes=axes, chunks=values.shape)


def _solution_group(solution: Solution) -> str:
    return f"solutions/{solution.solver_id}/{solution.layer}"
