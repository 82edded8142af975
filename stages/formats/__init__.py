"""Weight formats, one file each, and the table of them. A format that is not in the table does not exist.

format    | block   | grid               | stored scales
nvfp4     | 16      | e2m1, ±6           | e4m3 per block, f32 per tensor (amax / 2688)
fp8       | -       | e4m3, ±448         | f32 per tensor (amax / 448)
int4_awq  | 128     | integers -8 .. 7   | f32 per block (amax / 7)
w4a8_awq  | 128     | integers -8 .. 7   | f32 per block (amax / 7), f32 per tensor (amax / 448)
int8_sq   | the row | integers -128..127 | f32 per row (amax / 127)
"""

from stages.formats.fp8 import FP8
from stages.formats.int4_awq import INT4_AWQ
from stages.formats.int8_sq import INT8_SQ
from stages.formats.nvfp4 import NVFP4
from stages.formats.w4a8_awq import W4A8_AWQ
from stages.formats.weight_format import StoredTensor, WeightFormat

TABLE: dict[str, WeightFormat] = {format.name: format for format in (NVFP4, FP8, INT4_AWQ, W4A8_AWQ, INT8_SQ)}

__all__ = ["FP8", "INT4_AWQ", "INT8_SQ", "NVFP4", "TABLE", "W4A8_AWQ", "StoredTensor", "WeightFormat"]
