"""Read a run: `holdfast.open("runs/name").amax("model.layers.3.self_attn.q_proj.input_quantizer")`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.events import read_events
from state.head import Head
from state.home import expand_home
from state.layout import Layout, SiteArray
from state.names import Role, Site, join_name, split_key, split_name
from state.objects import BrokenObject, VerifiedStore, read_object, solutions
from state.paths import RECORD, ZARR
from state.record import RunRecord
from state.recovery import Found, find_head
from state.update import Generation, Solution

QUANTIZER_ROLES: dict[str, Role] = {
    ".input_quantizer": "input",
    ".weight_quantizer": "weight",
    ".k_bmm_quantizer": "k",
    ".v_bmm_quantizer": "v",
}
# One layer of a wide array, at most some 15 MB each.
CACHED_SLABS = 64


class ArraysOnDemand(Mapping[str, NDArray[Any]]):
    """Arrays by name, each read when it is looked up: those of one layer can be larger than memory."""

    def __init__(self, names: Sequence[str], read: Callable[[str], NDArray[Any]]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Calibration:
    """One commit of a run, read as it is asked for. Every object is checked against its digest on the way.

    Attributes:
        path: the run.
        head: the commit.
        record: content of `run.json`.
        notes: what was found damaged and passed over, in words; empty if nothing was.
        lost: solver → the layers whose solutions the commit names, and which are damaged.
    """

    def __init__(self, path: Path, found: Found, disk: Disk) -> None:
        self.path = path
        self.head: Head = found.head
        self.notes = found.notes
        whole = solutions(found.head.objects)
        self.lost = {
            solver: layers - whole.get(solver, set())
            for solver, layers in solutions(found.recorded.objects).items()
        }
        self._disk = disk
        self._store = VerifiedStore(path, found.head.objects, disk)
        self._slab = lru_cache(CACHED_SLABS)(self._read_slab)
        with self._checked():
            self.record = RunRecord.decode(read_object(path, RECORD, found.head.objects[RECORD], disk))

    @cached_property
    def layout(self) -> Layout:
        """The arrays of this commit; empty before the first statistics."""
        if self.head.generation is None:
            return Layout()
        return Layout.model_validate(self._attributes(self.head.generation)["layout"])

    @property
    def token_shape(self) -> tuple[int, int]:
        """(windows, seq) of the calibration tokens, as the record has it."""
        windows, seq = self.record.identity.tokens.partition("[")[2].partition("]")[0].split(",")
        return int(windows), int(seq)

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """The calibration tokens, int32 [windows, seq]."""
        return self._whole("tokens")

    def statistic(self, name: str, site: Site) -> NDArray[np.generic]:
        """A statistic at a site: [channels], or 0-d where it has no channel axis. NaN (-1 for counts): never
        observed.

        Raises:
            InputError: no such statistic or site; the message has the nearest names.
            DamagedStore: the stored array is damaged.
        """
        array, index = self.layout.locate(site)
        if name not in array.statistics:
            raise InputError(f"{site.role} of {site.module!r} has {', '.join(array.statistics)}, no {name!r}")
        return self._at(name, array, index)

    def amax(self, name: str) -> NDArray[np.float32]:
        """The largest |x| that a quantizer has seen, float32: [channels], or 0-d for a scalar.

        Args:
            name: a hub module name with or without `.input_quantizer`, `.weight_quantizer`,
                `.k_bmm_quantizer` or `.v_bmm_quantizer`; or modelopt's name of a quantizer in memory. One
                that experts share gives the elementwise max over them, NaN ignored.

        Raises:
            InputError: there is no such quantizer; the message has the nearest names.
            DamagedStore: the stored array is damaged.
        """
        pattern, layer, expert = split_name(name)
        if pattern in self.layout.quantizers:
            parts = [self._amax_of_key(key, name, layer, expert) for key in self.layout.quantizers[pattern]]
            return reduce(np.fmax, parts)
        for suffix, role in QUANTIZER_ROLES.items():
            if name.endswith(suffix):
                return self._amax_of_site(Site(name.removesuffix(suffix), role))
        if name.endswith("_quantizer") or "_quantizers." in name:
            near = get_close_matches(pattern, self.layout.quantizers, n=3, cutoff=0.4)
            names = ", ".join(join_name(one, layer or 0, expert or 0) for one in near) or "none"
            raise InputError(f"no quantizer {name!r}. Near names: {names}.")
        return self._amax_of_site(Site(name, "input"))

    def generation(self) -> Generation:
        """All statistics in memory, to go on from.

        Raises:
            DamagedStore: a stored array is damaged.
        """
        arrays = {
            f"{statistic}/{array.key}": self._whole(f"{self.head.generation}/{statistic}/{array.key}")
            for array in self.layout.arrays
            for statistic in array.statistics
        }
        return Generation(self.layout, arrays)

    def solution(self, solver_id: str, layer: int) -> Solution:
        """What a solver found for a layer; its arrays are read as they are asked for, and not kept.

        Raises:
            InputError: there is no such solution.
            DamagedStore: a stored array is damaged.
        """
        group = f"solutions/{solver_id}/{layer}"
        prefix = f"{ZARR}/{group}/"
        if f"{prefix}zarr.json" not in self.head.objects:
            raise InputError(f"{self.path} has no solution of {solver_id!r} for layer {layer}")
        inside = (path.removeprefix(prefix) for path in self.head.objects if path.startswith(prefix))
        names = sorted({path.partition("/")[0] for path in inside if "/" in path})
        arrays = ArraysOnDemand(names, lambda name: self._whole(f"{group}/{name}"))
        return Solution(solver_id, layer, arrays, self._attributes(group))

    def events(self) -> list[dict[str, Any]]:
        """The lines of `events.jsonl`; one cut short by a crash is left out."""
        return read_events(self.path, self._disk)

    def _amax_of_site(self, site: Site) -> NDArray[np.float32]:
        name = "weight_amax" if site.role == "weight" else "amax"
        return self.statistic(name, site).astype(np.float32, copy=False)

    def _amax_of_key(self, key: str, name: str, layer: int | None, expert: int | None) -> NDArray[np.float32]:
        pattern, role = split_key(key)
        if "E" not in pattern.split(".") or expert is not None:
            return self._amax_of_site(Site(join_name(pattern, layer, expert), role))
        array = self.layout.array(pattern, role, layer)
        if array is None:
            raise InputError(f"no statistics behind {name!r}: {key} has no layer {layer}")
        statistic = "weight_amax" if role == "weight" else "amax"
        slab = self._at(statistic, array, (array.layers.index(layer),) if layer in array.layers else ())
        return np.fmax.reduce(slab, axis=0) if array.experts is not None else slab

    def _at(self, name: str, array: SiteArray, index: tuple[int, ...]) -> NDArray[Any]:
        path = f"{self.head.generation}/{name}/{array.key}"
        if not array.layers:
            return self._slab(path, None)[index]
        return self._slab(path, index[0])[index[1:]]

    def _read_slab(self, path: str, layer: int | None) -> NDArray[Any]:
        with self._checked():
            array = zarr.open_array(self._store, path=path, mode="r")
            values = np.asarray(array[... if layer is None else layer])
        values.flags.writeable = False
        return values

    def _whole(self, path: str) -> NDArray[Any]:
        with self._checked():
            return np.asarray(zarr.open_array(self._store, path=path, mode="r")[...])

    def _attributes(self, group: str) -> dict[str, Any]:
        path = f"{ZARR}/{group}/zarr.json"
        with self._checked():
            if path not in self.head.objects:
                raise BrokenObject(path, "is named by no commit")
            metadata = json.loads(read_object(self.path, path, self.head.objects[path], self._disk))
        attributes: dict[str, Any] = metadata["attributes"]
        return attributes

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except BrokenObject as fault:
            newest = find_head(self.path, self._disk, verify=False).head.number
            if newest > self.head.number:
                # Going on in a newer commit would mix two generations.
                raise InputError(
                    f"{self.path} went on from commit {self.head.number} to {newest} while it was read, "
                    "and the older one was collected. Open it again."
                ) from fault
            raise DamagedStore(
                f"{self.path}: {fault}. `holdfast check {self.path}` says what is whole; the command that "
                "calibrated it, given again, makes what is lost again.",
                [fault.path],
            ) from fault


def open_run(path: Path | str, verify: bool = True, disk: Disk | None = None) -> Calibration:
    """Open a run for reading; nothing is locked or changed, a writer may go on meanwhile.

    Args:
        verify: check the digest of every object now, and fall back a commit where statistics are damaged (see
            `Calibration.notes`); solutions that are damaged are absent then. Otherwise damage is found, as
            an error, when the object is read.

    Raises:
        InputError: not a run, or of a newer format.
        Unreadable: the device can't give a file now.
        DamagedStore: no commit is whole.
    """
    path, disk = expand_home(path), disk or Disk()
    return Calibration(path, find_head(path, disk, verify), disk)
