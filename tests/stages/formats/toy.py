"""A format that the product does not have, in one file: int8 weights alone, a scale per row that is a power
of two. modelopt's name for weight-only INT8 is taken, so that one of its recipes places it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.weight_format import StoredTensor, WeightFormat


@dataclass(frozen=True)
class Toy(WeightFormat):
    """W = integer * 2^exponent[row]."""

    block_size: int = 0

    name = "int8_wo"
    grain = "row"
    bound = 64.0
    input_bound = 1.0
    solvers = frozenset({"gptq"})

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [StoredTensor("weight", "I8", (rows, columns)), StoredTensor("weight_scale", "F32", (rows,))]

    def round(self, x: Tensor) -> Tensor:
        return x.round().clamp_(-128, 127)

    def scales_from_amax(self, amax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        return super().scales_from_amax(amax, tensor_scale).log2().ceil().exp2()

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        return self.scales_from_amax(weight.abs().amax(-1).float(), None)

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        assert block_scale is not None
        return self.encode(self.round(weight.float() / block_scale[:, None]))

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"][:, None]


TOY = Toy()
