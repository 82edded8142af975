"""Weight formats: which values a weight can take, and the scales it is stored with. Batched, on any device.

A weight is `[..., N, K]` (leading axes: experts, or none). A format cuts each row into blocks of `block_size`
columns that share one scale; W = value * step, with `value` on the format's grid and `step` what the stored
scales multiply to:

    format | block   | grid               | stored scales                                | step
    nvfp4  | 16      | e2m1, ±6           | e4m3 per block, f32 per tensor (amax / 2688) | their product
    int4   | 128     | integers -8 .. 7   | f32 per block (amax / 7)                     | that scale
    int8   | the row | integers -128..127 | f32 per row (amax / 127)                     | that scale
    fp8    | the row | e4m3, ±448         | f32 per tensor (amax / 448)                  | that scale

The arithmetic is that of modelopt 0.47's packing (`NVFP4QTensor`, `pack_int4_in_uint8`, `INT8QTensor`,
`FP8QTensor`), operation by operation, so that packing a solver's result gives the same bytes; unlike its fake
quantization it needs no CUDA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
# modelopt keeps block scales between e4m3's smallest subnormal and its largest value: neither 0 nor NaN.
E4M3_MIN = 2.0**-9


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with x's sign; ties go to the even mantissa."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    # The grid's spacing is 0.5 below 2, 1 from 2 to 4, 2 from 4 to 6.
    spacing = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return magnitude.div_(spacing).round_().mul_(spacing).copysign_(x)


def round_int4(x: Tensor) -> Tensor:
    return x.round().clamp_(-8, 7)


def round_int8(x: Tensor) -> Tensor:
    return x.round().clamp_(-128, 127)


def round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


@dataclass(frozen=True)
class Format:
    """A row of the table above. `block_size` None: one block spans the row."""

    name: str
    block_size: int | None
    bound: float
    round: Callable[[Tensor], Tensor]

    def blocks(self, weights: Tensor) -> Tensor:
        """View `[..., N, K]` as `[..., N, blocks, block]`.

        Raises ValueError where K is no multiple of the block size: no engine takes a partial block.
        """
        columns = weights.shape[-1]
        size = self.block_size or columns
        if columns % size:
            raise ValueError(
                f"{self.name} needs a multiple of {size} input features, this weight has {columns}; "
                "leave the linear out of the recipe or choose another format"
            )
        return weights.unflatten(-1, (columns // size, size))


NVFP4 = Format("nvfp4", 16, E2M1_MAX, round_e2m1)
INT4 = Format("int4", 128, 7.0, round_int4)
INT8 = Format("int8", None, 127.0, round_int8)
FP8 = Format("fp8", None, E4M3_MAX, round_e4m3)
FORMATS = {format.name: format for format in (NVFP4, INT4, INT8, FP8)}


@dataclass(frozen=True)
class Quantized:
    """A weight in its format: `values` f32 on the grid `[..., N, K]` and the scales it is stored with.

    scale: nvfp4 e4m3 `[..., N, K/16]`, int4 f32 `[..., N, K/128]`, int8 f32 `[..., N, 1]`,
        fp8 f32 `[..., 1, 1]`.
    global_scale: nvfp4's f32 `[..., 1, 1]`, None for the others.
    """

    format: Format
    values: Tensor
    scale: Tensor
    global_scale: Tensor | None

    def dequantize(self) -> Tensor:
        """The weights an engine computes with: f32 `[..., N, K]`, as modelopt's `dequantize` gives them."""
        return (self.format.blocks(self.values) * step(self.scale, self.global_scale)[..., None]).flatten(-2)

    @staticmethod
    def concatenate(parts: Sequence["Quantized"]) -> "Quantized":
        """Join along the first axis (experts)."""
        shared = [part.global_scale for part in parts if part.global_scale is not None]
        return Quantized(
            parts[0].format,
            torch.cat([part.values for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(shared) if shared else None,
        )


@cache
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of a search on a device, copied there once: a GPU is waited for at every copy. f32, or int32
    for integers.
    """
    dtype = torch.int32 if all(isinstance(value, int) for value in values) else torch.float32
    return torch.tensor(values, dtype=dtype, device=device)


def step(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """What one unit of the grid is worth: f32, shaped as `scale`."""
    return scale if global_scale is None else scale.float() * global_scale


def global_scale(format: Format, weights: Tensor, amax: Tensor | None = None) -> Tensor | None:
    """NVFP4's per-tensor scale amax / (6 * 448), f32 `[..., 1, 1]`; None for formats without one.

    Args:
        weights: `[..., N, K]`; the linears of a fusion group are concatenated along N, so that they share it.
        amax: `[..., 1, 1]` taken instead of max|weights| (a clipped one, or that of a larger group).
    An all-zero weight gets scale 1: any finite scale decodes its zeros.
    """
    if format is not NVFP4:
        return None
    amax = tensor_amax(weights) if amax is None else amax.float()
    return (amax / (E2M1_MAX * E4M3_MAX)).masked_fill_(~(amax > 0), 1.0)


def tensor_amax(weights: Tensor) -> Tensor:
    """max|W| of each matrix: f32 `[..., 1, 1]`."""
    return weights.abs().amax(dim=(-2, -1), keepdim=True).float()


def scales_from_amax(format: Format, amax: Tensor, global_scale: Tensor | None) -> Tensor:
    """Block amax to stored scales, as modelopt rounds them.

    Args:
        amax: f32 `[..., N, blocks]` (int8 `[..., N, 1]`, fp8 `[..., 1, 1]`).
    """
    if global_scale is None:
        return (amax / format.bound).masked_fill_(~(amax > 0), 1.0)
    scale = amax / (E2M1_MAX * global_scale)
    scale.masked_fill_(scale == 0, 1.0)
    return scale.clamp_(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def block_amax(format: Format, weights: Tensor) -> Tensor:
    """The amax each stored scale comes from: shapes as in `scales_from_amax`."""
    if format is FP8:
        return tensor_amax(weights)
    return format.blocks(weights).abs().amax(-1).float()


def quantize(format: Format, weights: Tensor, scale: Tensor, global_scale: Tensor | None) -> Quantized:
    """Round `[..., N, K]` (bf16, f16, f32) to the nearest values under given scales."""
    steps = step(scale, global_scale)[..., None]
    values = format.round(format.blocks(weights).float() / steps).flatten(-2)
    return Quantized(format, values, scale, global_scale)


def round_to_nearest(format: Format, weights: Tensor, amax: Tensor | None = None) -> Quantized:
    """Quantize with scales from the weights' own amax.

    Args:
        amax: `[..., 1, 1]` for nvfp4's global scale or fp8's scale, instead of max|weights|.
    """
    shared = global_scale(format, weights, amax)
    own = amax if format is FP8 and amax is not None else block_amax(format, weights)
    return quantize(format, weights, scales_from_amax(format, own, shared), shared)
