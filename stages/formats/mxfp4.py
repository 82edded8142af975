"""MXFP4: e2m1 values in blocks of 32 and a power of two for each (OCP Microscaling Formats 1.0)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import E2M1_MAX, decode_e2m1, encode_e2m1, round_e2m1_down
from stages.formats.microscaling import Microscaling
from stages.formats.packing import e2m1_codes_down, pack_e2m1
from stages.formats.weight_format import StoredTensor


@dataclass(frozen=True)
class Mxfp4(Microscaling):
    """W = e2m1(nibble) * 2^(weight_scale - 127); two values a byte, the even column low."""

    name = "mxfp4"
    bound = E2M1_MAX
    input_bound = E2M1_MAX

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [
            StoredTensor("weight", "U8", (rows, columns // 2)),
            StoredTensor("weight_scale", "U8", (rows, columns // self.block_size)),
        ]

    def round(self, x: Tensor) -> Tensor:
        return round_e2m1_down(x)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_e2m1(codes.view(torch.uint8))

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """uint8 `[N, K/2]`."""
        assert block_scale is not None
        return pack_e2m1(weight, block_scale.view(torch.float8_e8m0fnu).float(), e2m1_codes_down)

    def encode(self, values: Tensor) -> Tensor:
        return encode_e2m1(values)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        steps = stored["weight_scale"].view(torch.float8_e8m0fnu).float()
        return (self.blocks(decode_e2m1(stored["weight"])) * steps[..., None]).flatten(-2)


MXFP4 = Mxfp4()
