"""Grids: the values that a quantized element can take, rounding to them, and the codes they are stored as."""

import torch
from torch import Tensor

E2M1_MAX = 6.0
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By code; the fourth bit is the sign."""

E4M3_MAX = 448.0

EXPONENT = 0x7F800000
"""The bits of a float32 that hold its exponent."""


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with x's sign; ties go to the even mantissa. x: f32."""
    limited = x.clamp(-E2M1_MAX, E2M1_MAX)
    # The grid's spacing is 0.5 below 2, 1 from 2 to 4, 2 from 4 to 6: half of the power of two that |x| is at
    # or above. Next to 1.5 * 2^22 the values of float32 lie 0.5 apart: to add it, times that power, rounds.
    powers = limited.abs().clamp_(min=1.0).view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32)
    powers.mul_(1.5 * 2.0**22)
    return limited.add_(powers).sub_(powers).copysign_(x)


def round_e2m1_down(x: Tensor) -> Tensor:
    """As `round_e2m1`, but ties go to the smaller magnitude, and zero is negative: modelopt's MXFP4."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    spacing = 0.5 + 0.5 * (magnitude > 2) + (magnitude > 4)
    magnitude.div_(spacing).sub_(0.5).ceil_().abs_().mul_(spacing)
    return torch.where(x > 0, magnitude, -magnitude)


def power_of_two(amax: Tensor, bound: float) -> Tensor:
    """The smallest power of two under which `amax` is no more than `bound`, as a scale of one byte:
    float8_e8m0fnu, of amax' shape; 2^-127 for zeros (modelopt's `MXFP8QTensor._compute_e8m0_exponent`).
    """
    exponents = (amax.float() / bound).log2().ceil().clamp(-127, 127)
    return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def round_int4(x: Tensor) -> Tensor:
    """The nearest of -8 .. 7."""
    return x.round().clamp_(-8, 7)


def round_int8(x: Tensor) -> Tensor:
    """The nearest of -128 .. 127."""
    return x.round().clamp_(-128, 127)


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 value; beyond ±448 that is ±448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def encode_e2m1(values: Tensor) -> Tensor:
    """Values on e2m1's grid to codes, two a byte, the even column low: f32 `[..., K]` → uint8 `[..., K / 2]`.

    A zero keeps its sign, as modelopt's does.
    """
    grid = torch.tensor(E2M1_MAGNITUDES, device=values.device)
    codes = torch.searchsorted(grid, values.abs().contiguous()) + 8 * values.signbit()
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 `[..., K / 2]`, two codes a byte, the even column low → f32 `[..., K]`."""
    signed = torch.tensor([*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES)], device=codes.device)
    return torch.stack([signed[(codes & 15).int()], signed[(codes >> 4).int()]], dim=-1).flatten(-2)


def encode_int4(values: Tensor) -> Tensor:
    """Integers of -8 .. 7 in two's complement, two rows in a byte, the even row low: f32 `[..., N, K]`, N
    even → uint8 `[..., N / 2, K]`.
    """
    codes = values.to(torch.int8)
    return ((codes[..., 0::2, :] & 15) | (codes[..., 1::2, :] << 4)).view(torch.uint8)


def decode_int4(codes: Tensor) -> Tensor:
    """uint8 `[..., N / 2, K]`, two rows in a byte, the even row low → f32 `[..., N, K]`."""
    both = codes.view(torch.int8)
    low, high = (both << 4) >> 4, both >> 4
    return torch.stack([low, high], dim=-2).flatten(-3, -2).float()
