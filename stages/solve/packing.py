"""A solver's weights as the bytes a checkpoint holds, kept in the store as int8."""

import torch
from torch import Tensor

from stages.formats.grids import FP8, INT4, INT8, NVFP4, Quantized

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack(quantized: Quantized) -> dict[str, Tensor]:
    """Field name → tensor, as a checkpoint stores them; int8 stands for the bytes of any narrow dtype.

    NVFP4: `values` [..., N, K/2], two e2m1 codes a byte, the even column low; `block_scale` the e4m3 bytes
    [..., N, K/16]. INT4: `values` [..., N/2, K], two rows in a byte, the even one low; `block_scale` f32
    [..., N, K/128]. FP8: `values` the e4m3 bytes [..., N, K], `block_scale` f32 [..., 1, 1]. INT8: `values`
    [..., N, K], `block_scale` f32 [..., N, 1].
    Raises ValueError for formats that have no packing here.
    """
    if quantized.format is NVFP4:
        return {
            "values": pack_e2m1(quantized.values),
            "block_scale": quantized.scale.view(torch.int8),
        }
    if quantized.format is INT4:
        return {"values": pack_int4(quantized.values), "block_scale": quantized.scale}
    if quantized.format is FP8:
        return {
            "values": quantized.values.to(torch.float8_e4m3fn).view(torch.int8),
            "block_scale": quantized.scale,
        }
    if quantized.format is INT8:
        return {"values": quantized.values.to(torch.int8), "block_scale": quantized.scale}
    raise ValueError(f"solved weights are not stored in {quantized.format.name} yet")


def pack_e2m1(values: Tensor) -> Tensor:
    """Values on e2m1's grid to codes: f32 `[..., K]` → int8 `[..., K / 2]`. A zero keeps its sign,
    as modelopt's does.
    """
    grid = torch.tensor(E2M1_MAGNITUDES, device=values.device)
    codes = torch.searchsorted(grid, values.abs().contiguous()) + 8 * values.signbit()
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8).view(torch.int8)


def pack_int4(values: Tensor) -> Tensor:
    """Integers of -8 .. 7 in two's complement: f32 `[..., N, K]`, N even → int8 `[..., N / 2, K]`."""
    codes = values.to(torch.int8)
    return (codes[..., 0::2, :] & 15) | (codes[..., 1::2, :] << 4)
