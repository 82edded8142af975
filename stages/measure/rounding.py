"""What engines do to inputs of quantized linears and to KV caches, simulated: rounded to the format and back.

Rounding is in float32. W4A16 formats and those whose name says weights only leave inputs alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.calibrate.observe.experts import GROUPED
from stages.formats import NVFP4
from stages.formats.grids import E4M3_MAX, round_e4m3, round_int8
from stages.formats.quantized import quantize

Round = Callable[[Tensor], Tensor]

MX_BLOCK = 32


def nvfp4(inputs: Tensor, scale: Tensor) -> Tensor:
    """Inputs `[..., K]` as NVFP4 holds them under an input scale `[]`: blocks get theirs from what they
    hold.
    """
    shared = scale.float().reshape(1, 1)
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    blocks = NVFP4.scales_from_amax(NVFP4.block_amax(rows), shared)
    return quantize(NVFP4, rows, blocks, shared).dequantize().view_as(inputs).to(inputs.dtype)


def fp8(inputs: Tensor, scale: Tensor) -> Tensor:
    """Inputs in e4m3 under one scale `[]`, what lies beyond it cut off."""
    return (round_e4m3(inputs.float() / scale) * scale).to(inputs.dtype)


def fp8_of_token(inputs: Tensor) -> Tensor:
    """Inputs in e4m3, each token under the scale of its largest value."""
    scale = (inputs.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=1e-12)
    return (round_e4m3(inputs.float() / scale) * scale).to(inputs.dtype)


def int8(inputs: Tensor, scale: Tensor) -> Tensor:
    """Inputs as integers of 8 bits under one scale `[]`."""
    return (round_int8(inputs.float() / scale) * scale).to(inputs.dtype)


def mxfp8(inputs: Tensor) -> Tensor:
    """Inputs in e4m3, each block of 32 under a power of two: the least that cuts nothing off."""
    blocks = inputs.float().unflatten(-1, (-1, MX_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(torch.ceil(torch.log2(largest / E4M3_MAX)))
    return (round_e4m3(blocks / scale) * scale).flatten(-2).to(inputs.dtype)


STATIC: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NVFP4": nvfp4,
    "NVFP4_AWQ": nvfp4,
    "FP8": fp8,
    "W4A8_AWQ": fp8,
    "W8A8_SQ_PER_CHANNEL": int8,
}
"""`quant_algo` → how its inputs are rounded under the scale that the checkpoint holds."""
DYNAMIC: Mapping[str, Round] = {"FP8_PER_CHANNEL_PER_TOKEN": fp8_of_token, "MXFP8": mxfp8}


def rounding(algo: str, scale: Tensor | None, before: Tensor | None) -> Round | None:
    """How the inputs of a linear are rounded; None where they are not. before: AWQ's scale `[K]`, which the
    engine multiplies inputs with.
    """
    if algo in STATIC and scale is not None:
        static = STATIC[algo]
        if before is None:
            return lambda inputs: static(inputs, scale)
        return lambda inputs: (static(inputs.float() * before, scale) / before).to(inputs.dtype)
    return DYNAMIC.get(algo)


class Rounded(TorchFunctionMode):
    """Within it, what is multiplied with certain weights is rounded, and K and V as attention sees them:
    torch's own (`scaled_dot_product_attention`).

    Args:
        weights: storage of a weight in memory → what is done to its inputs. keys, values: scales of the
            KV cache, None where it is not quantized.
    """

    def __init__(self, weights: Mapping[int, Round], keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.weights, self.keys, self.values = weights, keys, values
        self.reached: set[int] = set()
        self.attended = False

    @property
    def unreached(self) -> int:
        """Weights that nothing was seen to be multiplied with."""
        return len(self.weights.keys() - self.reached)

    @property
    def unattended(self) -> bool:
        """Whether K and V were to be rounded, and no attention was seen."""
        return self.keys is not None and not self.attended

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func is nn.functional.linear or name in GROUPED:
            storage = args[1].untyped_storage().data_ptr()
            if (done := self.weights.get(storage)) is not None:
                self.reached.add(storage)
                args = (done(args[0]), *args[1:])
        elif name == "scaled_dot_product_attention" and self.keys is not None and self.values is not None:
            self.attended = True
            args = (args[0], fp8(args[1], self.keys), fp8(args[2], self.values), *args[3:])
        return func(*args, **(kwargs or {}))
