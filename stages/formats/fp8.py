"""FP8: e4m3 values and one f32 scale per tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import E4M3_MAX, round_e4m3
from stages.formats.packing import by_rows
from stages.formats.weight_format import StoredTensor, WeightFormat


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """W = e4m3(element) * weight_scale."""

    block_size: int = 0

    name = "fp8"
    grain = "tensor"
    bound = E4M3_MAX
    input_bound = E4M3_MAX
    tensor_leaf = "weight_scale"
    shared_over = "fused experts"
    solvers = frozenset({"awq_lite", "awq_clip", "awq_full", "gptq"})
    holds_together = True

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [
            StoredTensor("weight", "F8_E4M3", (rows, columns)),
            StoredTensor("weight_scale", "F32", ()),
        ]

    def round(self, x: Tensor) -> Tensor:
        return round_e4m3(x)

    def round_input(self, x: Tensor, scale: Tensor) -> Tensor:
        return (round_e4m3(x.float() / scale) * scale).to(x.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def tensor_scale(self, amax: Tensor) -> Tensor:
        return amax / E4M3_MAX

    def gptq_on_gpu(
        self, columns: Tensor, factor: Tensor, tensor_scale: Tensor | None, fixed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        from stages.kernels.gptq_block import solve_fixed

        assert fixed is not None
        return solve_fixed(columns, factor, "fp8", fixed)

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        return None

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """float8_e4m3fn `[N, K]`. What a clipped scale leaves beyond ±448 becomes ±448; the bare conversion
        would make it NaN.

        The quotient is in the weight's own dtype, that of experts in one tensor in float32, as modelopt has
        it: there a scale with an axis of its own counts when torch chooses the dtype.
        """
        assert tensor_scale is not None
        scale = tensor_scale.reshape(()) if weight.dim() == 2 else tensor_scale.reshape(1)
        # As a number: a bound that is a tensor takes ten times as long.
        bound = (E4M3_MAX * tensor_scale).to(weight.dtype).item()
        packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        by_rows(
            weight.flatten(0, -2),
            packed.flatten(0, -2),
            lambda rows, _: (rows.clamp(-bound, bound) / scale).to(packed.dtype),
        )
        return packed

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"]


FP8 = Fp8()
