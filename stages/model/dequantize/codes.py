"""What the codes of quantized checkpoints stand for, before any scale. Pure functions over tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import decode_e2m1

INT4_IN_A_WORD = 8


@dataclass(frozen=True)
class Code:
    """How one stored row becomes numbers.

    name: for people. per_item: columns that one stored item holds. decode: `[rows, items]` → float32 `[rows,
    items * per_item]`.
    """

    name: str
    per_item: int
    decode: Callable[[Tensor], Tensor]


def _e2m1_pairs(codes: Tensor) -> Tensor:
    """Two e2m1 codes in a byte, the even column low (gpt-oss, DeepSeek-V4)."""
    table = decode_e2m1(torch.arange(256, dtype=torch.uint8)[:, None])
    return table[codes.contiguous().view(torch.uint8).int()].flatten(-2)


def _int4_words(codes: Tensor) -> Tensor:
    """Eight integers of -8 .. 7 in an int32, each stored plus 8, the first column lowest (compressed-tensors'
    `pack_to_int32`).
    """
    shifts = torch.arange(0, 4 * INT4_IN_A_WORD, 4, dtype=torch.int32)
    return ((codes[..., None] >> shifts & 15) - 8).flatten(-2).float()


E4M3 = Code("FP8", 1, Tensor.float)
E2M1 = Code("FP4", 2, _e2m1_pairs)
INT4 = Code("INT4", INT4_IN_A_WORD, _int4_words)
