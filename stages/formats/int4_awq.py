"""INT4 in groups, with AWQ or without: integers in blocks of 128 columns, an f32 scale per block."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import E4M3_MAX, decode_int4, encode_int4, round_int4
from stages.formats.packing import by_rows
from stages.formats.quantized import constants
from stages.formats.weight_format import CLIP_RATIOS, StoredTensor, WeightFormat
from state.errors import InputError


@dataclass(frozen=True)
class Int4Awq(WeightFormat):
    """W = integer * weight_scale, integers of -8 .. 7; two rows in a byte, the even one low."""

    block_size: int = 128

    name = "int4_awq"
    grain = "block"
    bound = 7.0
    standard_block = 128
    input_bound = E4M3_MAX
    solvers = frozenset({"awq_lite", "awq_clip", "awq_full", "gptq"})

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [
            StoredTensor("weight", "U8", (rows // 2, columns)),
            StoredTensor("weight_scale", "F32", (rows, columns // self.block_size)),
        ]

    @property
    def rows_together(self) -> int:
        return 2

    def refuse(self, name: str, shape: tuple[int, ...]) -> None:
        super().refuse(name, shape)
        if shape[0] % 2:
            raise InputError(
                f"{name} has {shape[0]} rows, of which {self.name} packs two into a byte; choose a recipe "
                "that leaves this module unquantized"
            )

    def round(self, x: Tensor) -> Tensor:
        return round_int4(x)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_int4(codes.view(torch.uint8))

    def gptq_on_gpu(
        self, columns: Tensor, factor: Tensor, tensor_scale: Tensor | None, fixed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        from stages.kernels.gptq_block import solve_block

        return solve_block(columns, factor, "int4", columns, constants(CLIP_RATIOS, columns.device))

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """f32 `[N, K/128]`."""
        return self.scales_from_amax(self.block_amax(weight) if block_amax is None else block_amax, None)

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """uint8 `[N/2, K]`."""
        assert block_scale is not None
        scale = block_scale[..., None]
        packed = torch.empty(weight.shape[0] // 2, weight.shape[1], dtype=torch.uint8, device=weight.device)

        def encode(rows: Tensor, part: slice) -> Tensor:
            return self.encode(self.round((self.blocks(rows) / scale[part]).flatten(-2)))

        return by_rows(weight, packed, encode, together=2)

    def encode(self, values: Tensor) -> Tensor:
        return encode_int4(values)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        return (self.blocks(decode_int4(stored["weight"])) * stored["weight_scale"][..., None]).flatten(-2)


INT4_AWQ = Int4Awq()
