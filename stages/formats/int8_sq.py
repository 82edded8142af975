"""INT8: integers and one f32 scale per row, as SmoothQuant's recipes use them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import round_int8
from stages.formats.packing import by_rows
from stages.formats.weight_format import StoredTensor, WeightFormat


@dataclass(frozen=True)
class Int8Sq(WeightFormat):
    """W = integer * weight_scale[row], integers of -128 .. 127."""

    block_size: int = 0

    name = "int8_sq"
    grain = "row"
    bound = 127.0
    input_bound = 127.0
    solvers = frozenset({"awq_lite", "awq_clip", "awq_full", "gptq", "smoothquant"})
    weight_axis = 0

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [StoredTensor("weight", "I8", (rows, columns)), StoredTensor("weight_scale", "F32", (rows,))]

    def round(self, x: Tensor) -> Tensor:
        return round_int8(x)

    def round_input(self, x: Tensor, scale: Tensor) -> Tensor:
        return (round_int8(x.float() / scale) * scale).to(x.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()

    def gptq_on_gpu(
        self, columns: Tensor, factor: Tensor, tensor_scale: Tensor | None, fixed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        from stages.kernels.gptq_block import solve_fixed

        assert fixed is not None
        return solve_fixed(columns, factor, "int8", fixed)

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """f32 `[N]`."""
        return self.scales_from_amax(weight.abs().amax(-1).float(), None)

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """int8 `[N, K]`."""
        assert block_scale is not None
        scale = block_scale[:, None]
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        return by_rows(weight, packed, lambda rows, part: self.encode(self.round(rows / scale[part])))

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.int8)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"][:, None]


INT8_SQ = Int8Sq()
