"""What the MX formats share: a power of two for each block of 32 (OCP Microscaling Formats 1.0)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import power_of_two
from stages.formats.packing import block_amax as amax_of_blocks
from stages.formats.weight_format import WeightFormat


@dataclass(frozen=True)
class Microscaling(WeightFormat):
    """W = element * 2^(weight_scale - 127)."""

    block_size: int = 32

    grain = "block"
    scale_dtype = torch.float8_e8m0fnu
    inputs = "found"

    def scales_from_amax(self, amax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        return power_of_two(amax, self.bound)

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """uint8 `[N, K/32]`, exponents of two, more by 127."""
        if block_amax is None:
            block_amax = amax_of_blocks(weight, self.block_size)
        return self.scales_from_amax(block_amax, None).view(torch.uint8)
