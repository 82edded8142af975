"""W4A8: weights as in INT4 groups, inputs in FP8, and an f32 scale per tensor that engines fold into FP8."""

from dataclasses import dataclass

from torch import Tensor

from stages.formats.grids import E4M3_MAX
from stages.formats.int4_awq import Int4Awq
from stages.formats.weight_format import StoredTensor


@dataclass(frozen=True)
class W4a8Awq(Int4Awq):
    """W = integer * weight_scale; weight_scale_2 is amax / 448 and divides nothing that is stored."""

    name = "w4a8_awq"
    tensor_leaf = "weight_scale_2"
    shared_over = "engine groups"
    solvers = frozenset({"awq_lite", "awq_clip", "awq_full"})

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [*super().stored(rows, columns), StoredTensor("weight_scale_2", "F32", ())]

    def tensor_scale(self, amax: Tensor) -> Tensor:
        return amax / E4M3_MAX


W4A8_AWQ = W4a8Awq()
