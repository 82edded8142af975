"""Packing: a weight and its scales to the bytes of its format. modelopt's own arithmetic does the work."""

import torch
from torch import Tensor

from stages.formats.grids import INT4, INT8, NVFP4, scales_from_amax

E4M3_MAX = 448.0


def pack_nvfp4(
    weight: Tensor, weight_scale_2: Tensor, block_size: int, block_amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two FP4 (e2m1) values a byte, low nibble first, and one e4m3 scale per block.

    Args:
        weight: `[N, K]` in bf16, f16 or f32, K a multiple of `block_size`.
        weight_scale_2: f32 `[]`.
        block_amax: f32 `[N, K/block_size]`, where a solver clips each block; else the blocks' own.
    Returns uint8 `[N, K/2]` and float8_e4m3fn `[N, K/block_size]`;
        W = e2m1(nibble) * weight_scale * weight_scale_2.
    """
    from modelopt.torch.export.quant_utils import to_quantized_weight
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    if block_amax is None:
        scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight, block_size, weight_scale_2)
    else:
        scale = scales_from_amax(NVFP4, block_amax, weight_scale_2)
    return to_quantized_weight(weight, scale, "nvfp4", weight_scale_2, block_size), scale


def pack_fp8(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """One e4m3 value an element: W = e4m3(element) * weight_scale, with `[N, K]` and f32 `[]`.

    What a clipped scale leaves beyond ±448 becomes ±448; the bare conversion would make it NaN.
    """
    from modelopt.torch.export.quant_utils import to_quantized_weight

    bound = E4M3_MAX * weight_scale
    packed: Tensor = to_quantized_weight(weight.clamp(-bound, bound), weight_scale, "fp8")
    return packed


def int4_scale(weight: Tensor, block_size: int, block_amax: Tensor | None = None) -> Tensor:
    """f32 `[N, K/block_size]`: each block's amax / 7, or 1 for a block of zeros."""
    own = weight.unflatten(-1, (-1, block_size)).abs().amax(-1).float()
    return scales_from_amax(INT4, own if block_amax is None else block_amax, None)


def pack_int4(weight: Tensor, weight_scale: Tensor, block_size: int) -> Tensor:
    """Two integers of -8 .. 7 a byte, from two rows, the even one low: uint8 `[N/2, K]`.

    W = integer * weight_scale, with `[N, K]` and f32 `[N, K/block_size]`.
    """
    from modelopt.torch.export.quant_utils import to_quantized_weight

    packed: Tensor = to_quantized_weight(weight, weight_scale, "int4_awq", None, block_size)
    return packed


def int8_scale(weight: Tensor) -> Tensor:
    """f32 `[N]`: each row's amax / 127, or 1 for a row of zeros."""
    return scales_from_amax(INT8, weight.abs().amax(-1).float(), None)


def pack_int8(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """One integer of -128 .. 127 an element: W = integer * weight_scale[row], int8 `[N, K]`."""
    from modelopt.torch.export.quant_utils import to_quantized_weight

    packed: Tensor = to_quantized_weight(weight, weight_scale, "int8_sq")
    return packed


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it lies so already."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
