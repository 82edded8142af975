"""Weights that a checkpoint stores quantized, made numbers again while they are read."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.model.weights import map_tensor
from state.source import Source


class Dequantizer(Protocol):
    """How the codes of one matrix become numbers."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The hub tensors of its scales."""

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the matrix whose codes have these many."""

    def dequantize(self, codes: Tensor, source: Source, expert: int | None) -> Tensor:
        """The matrix as it is stored, `[rows, columns]`, in the model's dtype.

        expert: index into the first axis of the scales, where they are of all experts.
        """


@dataclass(frozen=True)
class Fp8Blocks:
    """e4m3 codes with a scale for each square of 128 x 128, as DeepSeek-V3 and Qwen publish them:
    W = code * scale, in float32, rounded to `dtype`. Squares at the lower and right edge may be partial.

    scale: hub tensor, `[rows / 128, columns / 128]` rounded up, float32 or bfloat16.
    """

    scale: str
    block: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.scale,)

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns

    def dequantize(self, codes: Tensor, source: Source, expert: int | None) -> Tensor:
        scale = map_tensor(source, self.scale)
        if expert is not None:
            scale = scale[expert]
        rows, columns = codes.shape
        each = scale.float().repeat_interleave(self.block[0], 0)[:rows]
        each = each.repeat_interleave(self.block[1], 1)[:, :columns]
        return (codes.float() * each).to(self.dtype)
