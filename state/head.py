"""Heads: what a commit consists of. `heads/000012.json` never changes; `HEAD` says which one counts."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from state.errors import InputError
from state.frozen import Frozen
from state.identity import Environment, canonical_json, digest_json

FORMAT = 1
HEAD = "HEAD"
HEADS = "heads"

POINTER = re.compile(rb"heads/(\d{6,})\.json (xxh3:[0-9a-f]{32})\n")


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
        digest: of everything above.
    """

    format: int = FORMAT
    number: int
    cursor: Cursor
    finished: bool
    generation: str | None
    accepted_environments: tuple[Environment, ...] = ()
    objects: dict[str, str]
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
    ) -> "Head":
        """A head with its own digest."""
        unsigned = cls(
            number=number,
            cursor=cursor,
            finished=finished,
            generation=generation,
            accepted_environments=accepted_environments,
            objects=dict(sorted(objects.items())),
            digest="",
        )
        return unsigned.model_copy(update={"digest": _own_digest(unsigned.model_dump(mode="json"))})

    @property
    def path(self) -> str:
        """Relative to the run."""
        return f"{HEADS}/{self.number:06d}.json"

    @property
    def pointer(self) -> bytes:
        """The content of `HEAD` that makes this head count."""
        return f"{self.path} {self.digest}\n".encode()

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
        if version != FORMAT:
            raise InputError(
                f"{run} has store format {version}, and this Holdfast reads {FORMAT}. Update Holdfast."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BrokenHead(str(error)) from error


def read_pointer(data: bytes) -> tuple[int, str]:
    """Number and digest of the head that `HEAD` names.

    Raises:
        BrokenHead: not the bytes of a pointer.
    """
    match = POINTER.fullmatch(data)
    if match is None:
        raise BrokenHead("not a pointer")
    return int(match[1]), match[2].decode()


def head_numbers(names: list[str]) -> list[int]:
    """Numbers of the heads among the file names of `heads/`, ascending."""
    return sorted(int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d{6,}\.json", name))


def _own_digest(content: dict[str, Any]) -> str:
    return digest_json({name: value for name, value in content.items() if name != "digest"})
