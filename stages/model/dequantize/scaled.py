"""Matrices that are stored as codes and scales: W = value(code) * scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.model.dequantize.codes import Code
from stages.model.weights import map_tensor
from state.source import Source, TensorEntry

AT_ONCE = 1 << 24
"""Values that are float32 at a time."""

SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class ScaledWeight:
    """A matrix `[rows, columns]`, or one of each expert, that the files hold as codes and scales.

    Attributes:
        codes, scale: the stored tensors; `extra`: others that say nothing more (a stored shape).
        code: what a code stands for.
        rows, columns: of a matrix. experts: how many there are, None for one that is alone.
        grid: rows and columns of its scales. block: rows and columns that a scale spans; blocks at the lower
            and right edge may be partial.
        exponents: scales are stored as powers of two, in bytes (e8m0).
        transposed: it is presented as `[columns, rows]`, as models with such experts have it.
        dtype: what it is rounded to; the product is taken in float32.
    """

    codes: str
    scale: str
    code: Code
    rows: int
    columns: int
    experts: int | None
    grid: tuple[int, int]
    block: tuple[int, int]
    exponents: bool
    dtype: torch.dtype
    transposed: bool = False
    extra: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every stored tensor that it takes the place of."""
        return (self.codes, self.scale, *self.extra)

    @property
    def described(self) -> str:
        """The scheme, for people."""
        rows, columns = self.block
        if (rows, columns) == (self.rows, self.columns):
            return f"{self.code.name} per tensor"
        if self.grid == (self.rows, 1):
            return f"{self.code.name} per channel"
        where = f"groups of {columns}" if rows == 1 else f"blocks of {rows} x {columns}"
        return f"{self.code.name} in {where}"

    def entry(self, name: str, codes: TensorEntry) -> TensorEntry:
        """The tensor as it is presented, at the place of its codes."""
        shape = self._presented if self.experts is None else (self.experts, *self._presented)
        nbytes = self.dtype.itemsize * (self.experts or 1) * self.rows * self.columns
        return TensorEntry(name, SAFETENSORS[self.dtype], shape, codes.file, codes.start, nbytes)

    def read(self, stored: Source, expert: int | None = None) -> Tensor:
        """The tensor, or one expert's matrix, in memory of its own.

        Raises IdentityMismatch where what all of it is made from is not what was digested.
        """
        codes = map_tensor(stored, self.codes, expert)
        scale = self.scales(stored, expert)
        if self.experts is None or expert is not None:
            result = self._matrix(codes, scale)
        else:
            result = torch.empty(self.experts, *self._presented, dtype=self.dtype)
            for number, one in enumerate(result):
                one.copy_(self._matrix(codes[number], scale[number]))
        if expert is None:  # after the values were taken: what is written from here on is not in them
            for name in self.tensors:
                stored.require_digested(name, stored.read(name))
        return result

    def scales(self, stored: Source, expert: int | None = None) -> Tensor:
        """The scales as float32 `[..., *grid]`: of all experts, or of one."""
        scale = map_tensor(stored, self.scale, expert)
        if self.exponents:
            scale = scale.view(torch.float8_e8m0fnu)
        leading = () if self.experts is None or expert is not None else (self.experts,)
        return scale.float().reshape(*leading, *self.grid)

    @property
    def _presented(self) -> tuple[int, int]:
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    def _matrix(self, codes: Tensor, scale: Tensor) -> Tensor:
        codes = codes.reshape(self.rows, -1)
        result = torch.empty(self.rows, self.columns, dtype=self.dtype)
        high, wide = self.block
        step = high * max(1, AT_ONCE // (high * self.columns))
        for first in range(0, self.rows, step):
            values = self.code.decode(codes[first : first + step])[:, : self.columns]
            some = scale[first // high : -(-(first + step) // high)]
            each = some.repeat_interleave(high, 0)[: len(values)]
            if scale.shape[1] > 1:
                each = each.repeat_interleave(wide, 1)[:, : self.columns]
            result[first : first + step] = values.mul_(each)
        return result.mT.contiguous() if self.transposed else result
