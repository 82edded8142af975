"""Heads: what a commit consists of. `heads/000012.json` never changes; `HEAD` says which one counts, and
holds the same once more, so that neither of the two can be lost with what it names.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from state.errors import DamagedStore, InputError
from state.frozen import Frozen
from state.identity import Environment, canonical_json, digest_json
from state.paths import GENERATION, OBJECT, RECORD, ZARR, head_path

FORMAT = 2
READABLE = (1, 2)
"""Formats this version reads. The first had HEAD without the copy, and no records of what is being
written.
"""

POINTER = re.compile(rb"heads/(\d{6,})\.json (xxh3:[0-9a-f]{32})")


class BrokenHead(Exception):
    """The bytes of a head or of the pointer are not what was written."""


class Cursor(Frozen):
    """How far the calibration has come: the next thing to do is `batch` of `layer` of the pass.

    A whole-model schedule keeps `layer` at 0; a layerwise one counts it.
    """

    pass_number: int = 0
    layer: int = 0
    batch: int = 0


class Head(Frozen):
    """One commit.

    Attributes:
        format: version of the store.
        generation: the group in `calibration.zarr` that holds its statistics; None before the first.
        accepted_environments: those other than the record's in which a part of the work was done, by consent.
        objects: path relative to the run -> digest of the file's bytes, for every file of the commit.
        solved_behind: `statistics_digest` of the finished statistics that the solutions were made behind,
        while
            lost statistics are made again: if they come out with another one, the solutions go.
        digest: of everything above.
    """

    format: int = FORMAT
    number: int
    cursor: Cursor
    finished: bool
    generation: str | None
    accepted_environments: tuple[Environment, ...] = ()
    objects: dict[str, str]
    solved_behind: str | None = None
    digest: str

    @classmethod
    def of(
        cls,
        number: int,
        cursor: Cursor,
        finished: bool,
        generation: str | None,
        accepted_environments: tuple[Environment, ...],
        objects: dict[str, str],
        solved_behind: str | None = None,
    ) -> "Head":
        """A head with its own digest."""
        unsigned = cls(
            number=number,
            cursor=cursor,
            finished=finished,
            generation=generation,
            accepted_environments=accepted_environments,
            objects=dict(sorted(objects.items())),
            solved_behind=solved_behind,
            digest="",
        )
        return unsigned.model_copy(update={"digest": _own_digest(unsigned.model_dump(mode="json"))})

    @staticmethod
    def accepted(values: Iterable[Any]) -> tuple[Environment, ...]:
        """Environments from their JSON values."""
        return tuple(Environment.model_validate(value) for value in values)

    @property
    def in_the_log(self) -> dict[str, Any]:
        """What `events.jsonl` says of the commit: with the files, enough to make the head again."""
        said = self.model_dump(mode="json", exclude={"format", "objects", "digest"})
        return {name: value for name, value in said.items() if value or name in ("number", "finished")} | {
            "cursor": self.cursor.model_dump(),
            "head": self.digest,
        }

    @property
    def path(self) -> str:
        """Relative to the run."""
        return head_path(self.number)

    @property
    def pointer(self) -> bytes:
        """The content of `HEAD` that makes this head count."""
        return f"{self.path} {self.digest}\n".encode() + self.encode()

    @property
    def statistics(self) -> dict[str, str]:
        """The objects that are its statistics."""
        prefix = f"{ZARR}/{self.generation}/"
        return {path: seen for path, seen in self.objects.items() if path.startswith(prefix)}

    @property
    def statistics_digest(self) -> str:
        """Digest of its statistics, whatever their generation is called."""
        prefix = f"{ZARR}/{self.generation}/"
        return digest_json({path.removeprefix(prefix): seen for path, seen in self.statistics.items()})

    def encode(self) -> bytes:
        """The bytes of the head's file."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @classmethod
    def decode(cls, data: bytes, run: Path) -> "Head":
        """Inverse of `encode`.

        Raises:
            BrokenHead: not the bytes that `encode` gave.
            InputError: written by a newer Holdfast.
        """
        try:
            content = json.loads(data)
            intact = content["digest"] == _own_digest(content) and canonical_json(content) + b"\n" == data
            version = content["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenHead(str(error)) from error
        if not intact:
            raise BrokenHead("digest differs")
        if version not in READABLE:
            raise InputError(
                f"{run} has store format {version}, and this Holdfast reads {READABLE[0]} to {FORMAT}. "
                "Update Holdfast."
            )
        try:
            head = cls.model_validate(content)
        except ValidationError as error:
            raise BrokenHead(str(error)) from error
        _refuse_other_names(head, run)
        if RECORD not in head.objects:
            raise BrokenHead(f"names no {RECORD}")
        return head


@dataclass(frozen=True)
class Pointer:
    """What `HEAD` holds.

    Attributes:
        number, digest: of the head that counts; None where HEAD does not tell.
        head: that head, where HEAD holds it whole.
        fault: what is wrong with HEAD, in words; None if nothing is.
    """

    number: int | None = None
    digest: str | None = None
    head: Head | None = None
    fault: str | None = None


def read_pointer(data: bytes | None, run: Path) -> Pointer:
    """What the bytes of `HEAD` say, as far as they are whole; None stands for a missing file."""
    if data is None:
        return Pointer(fault="is missing")
    line, _, copy = data.partition(b"\n")
    match = POINTER.fullmatch(line)
    number, digest = (int(match[1]), match[2].decode()) if match else (None, None)
    if match and not copy and data == line + b"\n":
        return Pointer(number, digest)  # as the first format had it
    try:
        head = Head.decode(copy, run)
    except BrokenHead:
        return Pointer(number, digest, fault="is damaged")
    if head.pointer == data:
        return Pointer(head.number, head.digest, head)
    if match and (head.number, head.digest) != (number, digest):
        return Pointer(fault="is damaged")
    return Pointer(head.number, head.digest, head, "is damaged")


def head_numbers(names: list[str]) -> list[int]:
    """Numbers of the heads among the file names of `heads/`, ascending."""
    return sorted(int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d{6,}\.json", name))


def _own_digest(content: dict[str, Any]) -> str:
    return digest_json({name: value for name, value in content.items() if name != "digest"})


def _refuse_other_names(head: Head, run: Path) -> None:
    """Raise DamagedStore for a head with names that no commit gives: it could lead outside of the run."""
    generation = head.generation
    if head.number < 0 or (generation is not None and not GENERATION.fullmatch(generation)):
        raise DamagedStore(
            f"{run / head.path} names the generation {generation!r}, which no commit of Holdfast does. "
            f"Nothing in {run} was touched; it should not be trusted.",
            [head.path],
        )
    for path in head.objects:
        if not OBJECT.fullmatch(path):
            raise DamagedStore(
                f"{run / head.path} names {path!r}, which is no file of a run. Nothing in {run} was touched; "
                "it should not be trusted.",
                [head.path],
            )
