"""Weight formats, one file each, and the table of them. A format that is not in the table does not exist.

format      | block     | grid               | stored scales
nvfp4       | 16        | e2m1, ±6           | e4m3 per block, f32 per tensor (amax / 2688)
w4a16_nvfp4 | 16        | e2m1, ±6           | as nvfp4; inputs stay as they are
mxfp4       | 32        | e2m1, ±6           | a power of two per block (e8m0)
mxfp8       | 32        | e4m3, ±448         | a power of two per block (e8m0)
fp8         | -         | e4m3, ±448         | f32 per tensor (amax / 448)
fp8_pc_pt   | the row   | e4m3, ±448         | f32 per row (amax / 448)
fp8_pb_wo   | 128 x 128 | e4m3, ±448         | f32 per block (amax / 448); inputs stay as they are
int4_awq    | 128       | integers -8 .. 7   | f32 per block (amax / 7)
w4a8_awq    | 128       | integers -8 .. 7   | f32 per block (amax / 7), f32 per tensor (amax / 448)
int8_sq     | the row   | integers -128..127 | f32 per row (amax / 127)
"""

from stages.formats.fp8 import FP8
from stages.formats.fp8_pb_wo import FP8_PB_WO
from stages.formats.fp8_pc_pt import FP8_PC_PT
from stages.formats.int4_awq import INT4_AWQ
from stages.formats.int8_sq import INT8_SQ
from stages.formats.mxfp4 import MXFP4
from stages.formats.mxfp8 import MXFP8
from stages.formats.nvfp4 import NVFP4
from stages.formats.w4a8_awq import W4A8_AWQ
from stages.formats.w4a16_nvfp4 import W4A16_NVFP4
from stages.formats.weight_format import StoredTensor, WeightFormat

ALL = (NVFP4, W4A16_NVFP4, MXFP4, MXFP8, FP8, FP8_PC_PT, FP8_PB_WO, INT4_AWQ, W4A8_AWQ, INT8_SQ)
TABLE: dict[str, WeightFormat] = {format.name: format for format in ALL}

__all__ = [
    "FP8",
    "FP8_PB_WO",
    "FP8_PC_PT",
    "INT4_AWQ",
    "INT8_SQ",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "TABLE",
    "W4A8_AWQ",
    "W4A16_NVFP4",
    "StoredTensor",
    "WeightFormat",
]
