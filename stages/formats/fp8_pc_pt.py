"""FP8 per channel and token: e4m3 values and one f32 scale per row; engines find a scale for each token."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import E4M3_MAX, round_e4m3
from stages.formats.packing import by_rows
from stages.formats.weight_format import StoredTensor, WeightFormat


@dataclass(frozen=True)
class Fp8PcPt(WeightFormat):
    """W = e4m3(element) * weight_scale[row]."""

    block_size: int = 0

    name = "fp8_pc_pt"
    grain = "row"
    bound = E4M3_MAX
    input_bound = E4M3_MAX
    inputs = "found"
    weight_axis = 0

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [
            StoredTensor("weight", "F8_E4M3", (rows, columns)),
            StoredTensor("weight_scale", "F32", (rows,)),
        ]

    def round(self, x: Tensor) -> Tensor:
        return round_e4m3(x)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """f32 `[N]`."""
        return self.scales_from_amax(weight.abs().amax(-1).float(), None)

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """float8_e4m3fn `[N, K]`."""
        assert block_scale is not None
        scale = block_scale[:, None]
        packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        return by_rows(weight, packed, lambda rows, part: self.encode(rows / scale[part]))

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"][:, None]


FP8_PC_PT = Fp8PcPt()
