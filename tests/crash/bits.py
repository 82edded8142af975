"""Every single bit of the small records, inverted, through the reader that the commands use, in this process:
what is accepted must mean what was written.
"""

import json
import random
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.calibrate.forward.kept import BrokenRecord, read_boundary
from stages.export.records import Written, decode_journal, decode_mark
from stages.export.standing import damaged_files, read_identity
from state.durable import Disk
from state.errors import HoldfastError
from state.head import BrokenHead, Head, read_pointer
from state.objects import BrokenObject, read_object
from tests.crash.compare import newest_head
from tests.crash.damage import flipped
from tests.crash.trial import Laboratory, Result
from tests.crash.world import MINE, files_of

STATES = ("layerwise AWQ", "half AWQ", "export", "half export")
SMALL = 2048  # bytes; of larger files a seeded part of the bits is tried, unless all are asked for
PART = 2000  # bits

Read = Callable[[bytes], Any]
"""From the bytes of a record to what they mean; raises where they are not accepted."""

REFUSALS = (HoldfastError, BrokenHead, BrokenObject, BrokenRecord, ValueError)


class Refused(ValueError):
    """The bytes are not accepted."""


@dataclass(frozen=True)
class Record:
    """A small file of a state, by its path in it."""

    state: str
    path: str


class Giving(Disk):
    """A disk on which one file has other bytes."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data = path, data

    def read(self, path: Path) -> bytes:
        """The given bytes, or what is there."""
        return self._data if path == self._path else super().read(path)


def records(laboratory: Laboratory) -> list[Record]:
    """All records that there is a reader for."""
    found = []
    for state in STATES:
        folder = laboratory.folder / "templates" / state
        for name in sorted(files_of(folder)):
            belongs = name.startswith("run/") == ("export" not in state)
            if belongs and MINE not in name and reader(folder, name) is not None:
                found.append(Record(state, name))
    return found


def reader(folder: Path, name: str) -> Read | None:
    """How the commands read a file; None for one that is no small record."""
    run = folder / "run"
    if name == "run/HEAD":
        return lambda data: _pointer(data, run)
    if re.fullmatch(r"run/heads/\d+\.json", name):
        return lambda data: Head.decode(data, run)
    if name in ("run/run.json", "run/calibration.zarr/zarr.json") or name.endswith("/zarr.json"):
        path = name.removeprefix("run/")
        expected = (newest_head(run) or {"objects": {}})["objects"].get(path)
        if expected is not None:
            return lambda data: read_object(run, path, expected, Giving(run / path, data))
        return None
    if re.fullmatch(r"run/activations/.*\.json", name):
        return lambda data: _boundary(data, folder / name)
    export = folder / name.split("/")[0]
    if name.endswith("/holdfast_export.json"):
        journal = decode_journal((export / "holdfast_journal.jsonl").read_bytes())
        return lambda data: read_identity(Giving(folder / name, data), export, journal, "")
    if name.endswith("/holdfast_journal.jsonl"):
        before = _counting((folder / name).read_bytes(), export)
        return lambda data: _journal(data, export, before)
    return decode_mark if name.endswith("/holdfast_partial.json") else None


def bits_of(laboratory: Laboratory, record: Record, all_bits: bool, seed: int) -> list[int]:
    """Which bits of a record are tried: all of a small one, `PART` of a larger one unless all are wanted."""
    size = 8 * (laboratory.folder / "templates" / record.state / record.path).stat().st_size
    if all_bits or size <= 8 * SMALL:
        return list(range(size))
    return random.Random(seed).sample(range(size), PART)


def try_bits(laboratory: Laboratory, record: Record, bits: Iterable[int]) -> Result:
    """Read a record with each of the bits inverted, one at a time. `number` of the result: how many."""
    folder = laboratory.folder / "templates" / record.state
    read = reader(folder, record.path)
    assert read is not None
    data = (folder / record.path).read_bytes()
    meaning = read(data)
    tried, accepted = 0, []
    for bit in bits:
        tried += 1
        try:
            if read(flipped(data, bit)) != meaning:
                accepted.append(bit)
        except REFUSALS:
            continue
    verdict = "silent" if accepted else "identical"
    reason = f"bits {accepted[:5]} are accepted with another meaning" if accepted else ""
    return Result(record.state, "one bit, in process", record.path, tried, None, verdict, reason)


def _pointer(data: bytes, run: Path) -> Any:
    pointer = read_pointer(data, run)
    if pointer.fault is not None:
        raise Refused(pointer.fault)
    return pointer


def _boundary(data: bytes, path: Path) -> Any:
    written = json.loads(path.read_bytes())
    with tempfile.NamedTemporaryFile() as other:
        Path(other.name).write_bytes(data)
        return read_boundary(Path(other.name), written["layer"], written["circumstances"])


def _counting(data: bytes, export: Path) -> set[Written]:
    """The entries of a journal that count: those whose files are as they say. All others are written again
    or refused."""
    journal = decode_journal(data)
    damaged = damaged_files(export, journal, set(journal) - {"holdfast_export.json"})
    return {entry for name, entry in journal.items() if name not in damaged}


def _journal(data: bytes, export: Path, before: set[Written]) -> Any:
    """Nothing but what counted before may count."""
    return _counting(data, export) <= before
