"""Packing: a weight and its scales to the bytes of its format. modelopt's own arithmetic does the work."""

import torch
from torch import Tensor


def pack_nvfp4(weight: Tensor, weight_scale_2: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Two FP4 (e2m1) values a byte, low nibble first, and one e4m3 scale per block.

    Args:
        weight: `[N, K]` in bf16, f16 or f32, K a multiple of `block_size`.
        weight_scale_2: f32 `[]`.
    Returns uint8 `[N, K/2]` and float8_e4m3fn `[N, K/block_size]`;
        W = e2m1(nibble) * weight_scale * weight_scale_2.
    """
    from modelopt.torch.export.quant_utils import to_quantized_weight
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight, block_size, weight_scale_2)
    return to_quantized_weight(weight, scale, "nvfp4", weight_scale_2, block_size), scale


def pack_fp8(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """One e4m3 value an element: W = e4m3(element) * weight_scale, with `[N, K]` and f32 `[]`."""
    from modelopt.torch.export.quant_utils import to_quantized_weight

    packed: Tensor = to_quantized_weight(weight, weight_scale, "fp8")
    return packed


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it lies so already."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
