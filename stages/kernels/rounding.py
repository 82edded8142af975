"""Rounding to weight formats within kernels. The torch versions are in formats/grids.py."""

import triton
import triton.language as tl

NVFP4 = tl.constexpr(0)
INT4 = tl.constexpr(1)
INT8 = tl.constexpr(2)
FP8 = tl.constexpr(3)


@triton.jit
def round_half_even(x):
    """The nearest integer, ties to even: 0 <= x < 2^22. Beyond 1.5 * 2^23 floats are integers."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_e2m1_magnitude(x):
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 for x >= 0."""
    x = tl.minimum(x, 6.0)
    spacing = tl.where(x >= 4.0, 2.0, tl.where(x >= 2.0, 1.0, 0.5))
    return round_half_even(x / spacing) * spacing


@triton.jit
def round_e4m3_magnitude(x):
    """Nearest e4m3 value for x >= 0, saturating at 448."""
    x = tl.minimum(x, 448.0)
    # Three mantissa bits: values are spaced 2^(exponent - 3), from the subnormals' exponent -6 on.
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    spacing = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)
    return tl.minimum(round_half_even(x / spacing) * spacing, 448.0)


@triton.jit
def round_to(x, FORMAT: tl.constexpr):
    """The nearest value on a format's grid."""
    negative = x < 0
    magnitude = tl.abs(x)
    if FORMAT == NVFP4:
        magnitude = round_e2m1_magnitude(magnitude)
    elif FORMAT == FP8:
        magnitude = round_e4m3_magnitude(magnitude)
    elif FORMAT == INT4:
        magnitude = tl.minimum(round_half_even(tl.minimum(magnitude, 16.0)), tl.where(negative, 8.0, 7.0))
    else:
        magnitude = tl.minimum(
            round_half_even(tl.minimum(magnitude, 256.0)), tl.where(negative, 128.0, 127.0)
        )
    return tl.where(negative, -magnitude, magnitude)


@triton.jit
def nvfp4_scale(amax, shared):
    """A block's e4m3 scale, from its amax and the global scale."""
    scale = tl.div_rn(amax, 6.0 * shared)
    return round_e4m3_magnitude(tl.where(scale == 0.0, 1.0, tl.maximum(scale, 0.001953125)))


@triton.jit
def nvfp4_step(amax, shared):
    """What one unit of e2m1 is worth in a block of this amax."""
    return nvfp4_scale(amax, shared) * shared


@triton.jit
def encode_e4m3(x):
    """The code, int32, of a positive value that e4m3 holds."""
    normal = (x.to(tl.int32, bitcast=True) >> 20) - ((127 - 7) << 3)
    return tl.where(x < 0.015625, (x * 512.0).to(tl.int32), normal)


@triton.jit
def decode_e4m3(code):
    """The value of a positive code."""
    normal = ((code + ((127 - 7) << 3)) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
