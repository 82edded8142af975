"""What an engine computes with: the weights of an exported checkpoint, dequantized."""

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_OF_CODE = torch.cat([E2M1, -E2M1])


def weight_of(tensors: dict[str, Tensor], module: str) -> Tensor:
    """W in float32 `[out, in]`, from the tensors of a module in any format."""
    packed, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if packed.dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn:
        steps = scale.float() * tensors[f"{module}.weight_scale_2"]
        return _by_block(E2M1_OF_CODE[_nibbles(packed, dim=-1).long()], steps)
    if packed.dtype == torch.uint8:
        codes = _nibbles(packed, dim=-2).to(torch.int8)
        return _by_block((codes - 16 * (codes > 7)).float(), scale)
    if packed.dtype == torch.int8:
        return packed.float() * scale[:, None]
    return packed.float() * scale


def _nibbles(packed: Tensor, dim: int) -> Tensor:
    """Both halves of each byte, the low one first, interleaved along `dim`, -1 or -2."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=dim)
    return halves.flatten(-2) if dim == -1 else halves.flatten(-3, -2)


def _by_block(values: Tensor, steps: Tensor) -> Tensor:
    return (values.unflatten(-1, (steps.shape[-1], -1)) * steps[..., None]).flatten(-2)
