"""The record of what is about to be written: `heads/000013.writing` names every file of a commit before the
first of them exists.

It is durable before they are, and goes when a head names them. Where a commit was cut short it proves which
files are leftovers of ours; nothing else is ever taken for one.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state.durable import Disk
from state.errors import InputError
from state.identity import canonical_json, digest_json
from state.paths import HEADS, WRITTEN, refuse_links

NAME = re.compile(r"(\d{6,})\.writing")
BEGINNING = b'{"digest":"xxh3:'


@dataclass(frozen=True)
class Writing:
    """What a commit is about to write. files: paths relative to the run, none of which existed before."""

    number: int
    files: tuple[str, ...]

    @property
    def path(self) -> str:
        """Of the record, relative to the run."""
        return f"{HEADS}/{self.number:06d}.writing"

    def encode(self) -> bytes:
        """The bytes of the record."""
        content: dict[str, Any] = {"number": self.number, "files": list(self.files)}
        return canonical_json({"digest": digest_json(content)} | content) + b"\n"

    def begin(self, run: Path, disk: Disk) -> None:
        """Write the record, durably where `heads/` is.

        Raises:
            InputError: a file of that name is there already; or a folder on the way is a symbolic link.
        """
        refuse_links(run, [*self.files, self.path])
        for path in (*self.files, self.path):
            if (run / path).exists() or (run / path).is_symlink():
                raise InputError(
                    f"{run / path} is in the way: no commit names it, so it is not removed. Move it "
                    "elsewhere, then give the same command again."
                )
        disk.put(run / self.path, self.encode())
        disk.sync([run / HEADS])

    def end(self, run: Path, disk: Disk) -> None:
        """Remove the record, once a head names the files."""
        disk.remove(run / self.path)


def read_writing(run: Path, name: str, disk: Disk) -> Writing | None:
    """The record in the file `name` of `heads/`; None where it is not one of ours.

    A record that was itself cut short is one of ours without files: it is durable before any of them is
    written.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    try:
        data = disk.read(run / HEADS / name)
    except OSError:  # gone by now, or lost
        return None
    if not data.endswith(b"\n"):
        return Writing(int(match[1]), ()) if data[: len(BEGINNING)] == BEGINNING[: len(data)] else None
    try:
        content = json.loads(data)
        record = Writing(content["number"], tuple(content["files"]))
        whole = record.encode() == data and record.path == f"{HEADS}/{name}"
    except (ValueError, KeyError, TypeError):
        return None
    return record if whole and all(map(WRITTEN.fullmatch, record.files)) else None


def all_writing(run: Path, names: Iterable[str], disk: Disk) -> list[Writing]:
    """Every record of ours among the file names of `heads/`."""
    found = (read_writing(run, name, disk) for name in names if NAME.fullmatch(name))
    return [record for record in found if record is not None]
