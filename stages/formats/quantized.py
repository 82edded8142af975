"""Quantizing under given scales, the same for every format. Batched, on any device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stages.formats.weight_format import WeightFormat


@dataclass(frozen=True)
class Quantized:
    """A weight in its format: `values` f32 on the grid `[..., N, K]` and the scales it is stored with.

    scale: `[..., N, blocks]`, a row's `[..., N, 1]`, a tensor's `[..., 1, 1]`; in the format's `scale_dtype`.
    tensor_scale: NVFP4's f32 `[..., 1, 1]`, None for formats whose scales stand alone.
    """

    format: WeightFormat
    values: Tensor
    scale: Tensor
    tensor_scale: Tensor | None

    def dequantize(self) -> Tensor:
        """The weights an engine computes with: f32 `[..., N, K]`, as modelopt's `dequantize` gives them."""
        return (self.format.blocks(self.values) * step(self.scale, self.tensor_scale)[..., None]).flatten(-2)

    def encoded(self) -> dict[str, Tensor]:
        """`values` and `block_scale` as a checkpoint holds them; int8 stands for the bytes of any narrow
        dtype, since a run's store has no such dtypes.
        """
        return {"values": _storable(self.format.encode(self.values)), "block_scale": _storable(self.scale)}

    @staticmethod
    def decoded(
        format: WeightFormat, values: Tensor, block_scale: Tensor, amax: Tensor | None
    ) -> "Quantized":
        """What `encoded` was made of.

        Args:
            amax: f32 `[...]`, what the tensor scale comes from, where the format has one beside block scales.
        """
        scale = block_scale.view(format.scale_dtype)
        shared = None
        if format.grain == "block" and format.tensor_leaf is not None:
            assert amax is not None
            shared = format.search_scale(torch.empty(0), amax[..., None, None])
        return Quantized(format, format.decode(values), scale, shared)

    @staticmethod
    def concatenate(parts: Sequence["Quantized"]) -> "Quantized":
        """Join along the first axis (experts)."""
        shared = [part.tensor_scale for part in parts if part.tensor_scale is not None]
        return Quantized(
            parts[0].format,
            torch.cat([part.values for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(shared) if shared else None,
        )


def _storable(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int8) if tensor.element_size() == 1 else tensor


@cache
def constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of a search on a device, copied there once: a GPU is waited for at every copy. f32, or int32
    for integers.
    """
    dtype = torch.int32 if all(isinstance(value, int) for value in values) else torch.float32
    return torch.tensor(values, dtype=dtype, device=device)


def step(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """What one unit of the grid is worth: f32, shaped as `scale`."""
    return scale.float() if tensor_scale is None else scale.float() * tensor_scale


def quantize(format: WeightFormat, weights: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> Quantized:
    """Round `[..., N, K]` (bf16, f16, f32) to the nearest values under given scales."""
    steps = step(scale, tensor_scale)[..., None]
    values = format.round(format.blocks(weights).float() / steps).flatten(-2)
    return Quantized(format, values, scale, tensor_scale)


def round_to_nearest(format: WeightFormat, weights: Tensor, amax: Tensor | None = None) -> Quantized:
    """Quantize with scales from the weights' own amax.

    Args:
        amax: `[..., 1, 1]`, for the scale of the whole tensor, instead of max|weights|.
    """
    shared = format.search_scale(weights, amax)
    own = amax if format.grain == "tensor" and amax is not None else format.block_amax(weights)
    return quantize(format, weights, format.scales_from_amax(own, shared), shared)
