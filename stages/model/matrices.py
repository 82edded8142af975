"""Where the `[out, in]` matrix of a module lies in the checkpoint, and how it is read from there.

Mostly it is a tensor of its own, whole. A checkpoint may also hold the matrices of several modules in one
tensor, by expert or by rows, and store them transposed. Whoever needs a weight as the checkpoint has it reads
it through a `StoredMatrix`; nobody else knows the layout. Of a checkpoint that is quantized already the
source presents plain tensors (stages/model/dequantize).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.model.weights import map_tensor
from state.source import Source, TensorEntry


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix, or where it is part of a tensor: index the expert, transpose, then take the rows.

    Attributes:
        tensor: the hub tensor, `[out, in]` where nothing else is said.
        expert: index into the first axis of a tensor that holds all experts.
        transposed: the last two axes are stored as `[in, out]`.
        first, stride, count: the rows, of those that the tensor holds for this expert: from `first`, every
            `stride`-th (2 where gate and up are interleaved), `count` of them (None: to the end).
    """

    tensor: str
    expert: int | None = None
    transposed: bool = False
    first: int = 0
    stride: int = 1
    count: int | None = None

    def shape(self, tensors: Mapping[str, TensorEntry]) -> tuple[int, int]:
        """`(out, in)`."""
        rows, columns = tensors[self.tensor].shape[-2:]
        if self.transposed:
            rows, columns = columns, rows
        return len(range(rows)[self.rows]), columns

    def read(self, source: Source) -> Tensor:
        """The matrix `[out, in]` in memory of its own."""
        return self._view(source).clone(memory_format=torch.contiguous_format)

    def _view(self, source: Source) -> Tensor:
        return self.part(map_tensor(source, self.tensor, self.expert))

    def part(self, stored: Tensor) -> Tensor:
        """The view of this matrix, `[out, in]`, in its tensor, or in what that holds of its expert."""
        return (stored.mT if self.transposed else stored)[self.rows]

    def rows_between(self, first: int, last: int, total: int) -> tuple[slice, slice]:
        """Which of the tensor's rows `first .. last` this matrix has, counted from `first`, and which of its
        own they are. total: rows that the tensor holds for this expert.
        """
        own = range(total)[self.rows]
        inside = range(first + (own.start - first) % own.step, last, own.step)
        start, stop = max(own.start, inside.start), min(own.stop, last)
        count = len(range(start, stop, own.step))
        begins = (start - own.start) // own.step
        return slice(start - first, start - first + count * own.step, own.step), slice(begins, begins + count)

    def place(self, whole: Tensor) -> Tensor:
        """The view of this matrix, `[out, ...]`, in a tensor with the axes of the stored one; `in` may be
        shorter there.
        """
        return self.part(whole if self.expert is None else whole[self.expert])

    @property
    def rows(self) -> slice:
        """Which of the rows that the tensor holds for this expert."""
        stop = None if self.count is None else self.first + self.count * self.stride
        return slice(self.first, stop, self.stride)


def read_stacked(source: Source, matrices: Sequence[StoredMatrix]) -> Tensor:
    """Matrices of one shape and dtype, such as a projection of every expert: `[len(matrices), out, in]`, each
    equal to its `read`. Every byte is copied once.
    """
    first = matrices[0]._view(source)
    stacked = torch.empty(len(matrices), *first.shape, dtype=first.dtype)
    for position, matrix in enumerate(matrices):
        stacked[position] = matrix._view(source)
    return stacked
