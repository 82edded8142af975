"""The source's tensors, read once, in pieces of a bounded size, each compared with what the run recorded.

Whatever is read is digested in the memory that it is worked on in, so that nothing can come between. A tensor
that is read in pieces has one digest, known at its end: who has used the earlier pieces must not keep what
was made of them before `pieces` is through. Where only some of its experts are wanted, all of it is read
ahead, once, and from then on each expert is compared with what it was.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from stages.export.provenance import refuse_other_tensors
from stages.model.raw import raw_bytes
from stages.model.weights import dtype_of, map_tensor, read_tensor
from state.identity import Digesting, described, digest
from state.large_reads import LargeReads
from state.source import Source, TensorEntry

AT_ONCE = 1 << 24
"""Bytes of a piece, unless a single row or what can't be cut takes more."""

ROWS = 4
"""Pieces begin at multiples of at least this many rows."""

Cut = Literal["whole", "bytes", "rows", "experts", "experts' rows"]
"""How a tensor may be cut: not at all; anywhere, since it passes through; between rows, experts, or both."""


@dataclass(frozen=True)
class Piece:
    """A part of a source tensor.

    data: all of the tensor; uint8 of a tensor cut anywhere; else rows of the matrix `[rows, columns]` that it
    is or holds for an expert, from `first` on, and `total` is how many there are.
    """

    tensor: str
    data: Tensor
    expert: int | None = None
    first: int = 0
    total: int = 0

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True)
class _Span:
    """Where a piece lies in its tensor, in bytes, and what it is."""

    start: int
    nbytes: int
    expert: int | None = None
    first: int = 0
    total: int = 0


class SourceReader:
    """Reads a source for one export, by one thread.

    Args:
        digests: hub tensor → what the run recorded of it.
    """

    def __init__(self, source: Source, digests: Mapping[str, str], files: LargeReads) -> None:
        self.source, self.digests, self.files = source, digests, files
        self._experts: dict[str, list[str]] = {}

    def pieces(
        self, name: str, cut: Cut, experts: Collection[int] = (), together: int = ROWS
    ) -> Iterator[Piece]:
        """A tensor in pieces, in order.

        Args:
            experts: those that are wanted, of a tensor that is cut between them.
            together: a tensor that is cut between rows is so at multiples of this many.

        Raises:
            IdentityMismatch: it is not the run's; every tensor that is not is named.
            InputError, Unreadable: see `LargeReads.read`.
        """
        entry = self.source.tensors[name]
        if self.source.stored.get(name) != entry:
            yield from self._made(name, cut, experts)
        elif cut.startswith("experts") and len(experts) < entry.shape[0]:
            yield from self._some_experts(entry, experts)
        else:
            yield from self._plain(entry, _spans(entry, cut, together), cut)

    def _plain(self, entry: TensorEntry, spans: list[_Span], cut: Cut) -> Iterator[Piece]:
        found = Digesting()
        for span in spans:
            data = self._read(entry, span)
            found.update(raw_bytes(data))
            if span is spans[-1]:
                self._require(entry.name, described(entry.dtype, entry.shape, str(found)))
            yield _piece(entry, span, data, cut)

    def _some_experts(self, entry: TensorEntry, wanted: Collection[int]) -> Iterator[Piece]:
        name, spans = entry.name, _spans(entry, "experts")
        if name not in self._experts:
            found, parts = Digesting(), []
            for span in spans:
                read = raw_bytes(self._read(entry, span))
                found.update(read)
                parts.append(digest(read))
            self._require(name, described(entry.dtype, entry.shape, str(found)))
            self._experts[name] = parts
        for expert in sorted(wanted):
            data = self._read(entry, spans[expert])
            if digest(raw_bytes(data)) != self._experts[name][expert]:
                self._refuse(name, self.source.digest(name))
            yield _piece(entry, spans[expert], data, "experts")

    def _made(self, name: str, cut: Cut, experts: Collection[int]) -> Iterator[Piece]:
        """A tensor that the source makes of others, which are compared before and behind it."""
        shape, made_from = self.source.tensors[name].shape, self.source.made_from(name)
        self._compare(made_from)
        if cut.startswith("experts"):
            for expert in sorted(experts):
                values = map_tensor(self.source, name, expert)
                yield Piece(name, values, expert, 0, shape[1])
        else:
            data = read_tensor(self.source, name)
            if cut == "bytes":
                data = data.reshape(-1).view(torch.uint8)
            yield Piece(name, data, None, 0, shape[0] if shape else 0)
        self._compare(made_from)

    def _read(self, entry: TensorEntry, span: _Span) -> Tensor:
        data = torch.empty(span.nbytes, dtype=torch.uint8)
        path = self.source.files[entry.file].path
        self.files.read(path, entry.start + span.start, data.numpy().data)
        return data

    def _compare(self, names: Collection[str]) -> None:
        for name in names:
            self._require(name, self.source.digest(name))

    def _require(self, name: str, found: str) -> None:
        if found != self.digests.get(name):
            self._refuse(name, found)

    def _refuse(self, name: str, found: str) -> None:
        refuse_other_tensors(self.source, self.digests, self.source.digests(threads=2) | {name: found})


def largest_piece(entry: TensorEntry, cut: Cut, together: int) -> int:
    """Bytes of the largest piece of a tensor."""
    return max(span.nbytes for span in _spans(entry, cut, together))


def _spans(entry: TensorEntry, cut: Cut, together: int = ROWS) -> list[_Span]:
    """The pieces of a tensor; at least one."""
    shape = entry.shape
    if cut == "whole":
        return [_Span(0, entry.nbytes, None, 0, shape[0] if shape else 0)]
    if cut == "bytes":
        cuts = range(0, max(1, entry.nbytes), AT_ONCE)
        return [_Span(start, min(AT_ONCE, entry.nbytes - start)) for start in cuts]
    by_expert = cut.startswith("experts")
    experts, rows = (shape[0], shape[1]) if by_expert else (1, shape[0])
    row = entry.nbytes // prod((experts, rows))
    step = max(together, AT_ONCE // row // together * together) if cut.endswith("rows") else rows
    return [
        _Span(
            (expert * rows + first) * row,
            min(step, rows - first) * row,
            expert if by_expert else None,
            first,
            rows,
        )
        for expert in range(experts)
        for first in range(0, rows, step)
    ]


def _piece(entry: TensorEntry, span: _Span, data: Tensor, cut: Cut) -> Piece:
    if cut == "bytes":
        return Piece(entry.name, data)
    values = data.view(dtype_of(entry))
    values = values.reshape(entry.shape if cut == "whole" else (-1, entry.shape[-1]))
    return Piece(entry.name, values, span.expert, span.first, span.total)
