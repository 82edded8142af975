"""FP8 in square blocks, for weights alone: e4m3 values and one f32 scale for 128 rows and 128 columns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.formats.grids import E4M3_MAX, round_e4m3
from stages.formats.packing import block_amax as amax_of_blocks
from stages.formats.packing import by_rows
from stages.formats.weight_format import StoredTensor, WeightFormat


@dataclass(frozen=True)
class Fp8PbWo(WeightFormat):
    """W = e4m3(element) * weight_scale[row / 128, 0, column / 128, 0]; blocks at the lower and the right edge
    may be partial, as modelopt has it.

    For solvers every row has its block's scale: `[..., N, K/128]`.
    """

    block_size: int = 128

    name = "fp8_pb_wo"
    grain = "block"
    bound = E4M3_MAX
    input_bound = E4M3_MAX
    inputs = "plain"
    square = True

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        size = self.block_size
        return [
            StoredTensor("weight", "F8_E4M3", (rows, columns)),
            StoredTensor("weight_scale", "F32", (-(-rows // size), 1, -(-columns // size), 1)),
        ]

    def refuse(self, name: str, shape: tuple[int, ...]) -> None:
        """Takes every shape."""

    def round(self, x: Tensor) -> Tensor:
        return round_e4m3(x)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def block_amax(self, weights: Tensor) -> Tensor:
        found = self._over_rows(super().block_amax(weights))
        return found.repeat_interleave(self.block_size, -2)[..., : weights.shape[-2], :]

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """f32 `[N/128, 1, K/128, 1]`."""
        whole = pad(weight, (0, -weight.shape[1] % self.block_size))
        found = self._over_rows(amax_of_blocks(whole, self.block_size))
        return self.scales_from_amax(found, None)[:, None, :, None]

    def _over_rows(self, amax: Tensor) -> Tensor:
        """The largest of each block of rows: f32 `[..., N, B]` → `[..., ceil(N / 128), B]`."""
        whole = pad(amax, (0, 0, 0, -amax.shape[-2] % self.block_size))
        return whole.unflatten(-2, (-1, self.block_size)).amax(-2)

    def _of_rows(self, scale: Tensor, rows: int) -> Tensor:
        """Each row's scales: f32 `[N/128, 1, K/128, 1]` → `[N, K/128]`."""
        return scale[:, 0, :, 0].repeat_interleave(self.block_size, 0)[:rows]

    def _of_columns(self, scale: Tensor, columns: int) -> Tensor:
        return scale.repeat_interleave(self.block_size, 1)[:, :columns]

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """float8_e4m3fn `[N, K]`."""
        assert block_scale is not None
        scale, columns = self._of_rows(block_scale, len(weight)), weight.shape[1]
        packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        return by_rows(
            weight, packed, lambda rows, part: self.encode(rows / self._of_columns(scale[part], columns))
        )

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        weight = stored["weight"].float()
        return weight * self._of_columns(self._of_rows(stored["weight_scale"], len(weight)), weight.shape[1])


FP8_PB_WO = Fp8PbWo()
