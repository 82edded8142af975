"""MXFP8: e4m3 values in blocks of 32 and a power of two for each (OCP Microscaling Formats 1.0)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.formats.grids import E4M3_MAX, round_e4m3
from stages.formats.microscaling import Microscaling
from stages.formats.packing import by_rows
from stages.formats.weight_format import StoredTensor


@dataclass(frozen=True)
class Mxfp8(Microscaling):
    """W = e4m3(element) * 2^(weight_scale - 127)."""

    name = "mxfp8"
    bound = E4M3_MAX
    input_bound = E4M3_MAX

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [
            StoredTensor("weight", "F8_E4M3", (rows, columns)),
            StoredTensor("weight_scale", "U8", (rows, columns // self.block_size)),
        ]

    def round(self, x: Tensor) -> Tensor:
        return round_e4m3(x)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """float8_e4m3fn `[N, K]`."""
        assert block_scale is not None
        steps = block_scale.view(torch.float8_e8m0fnu).float()[..., None]
        packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)

        def encode(rows: Tensor, part: slice) -> Tensor:
            quotients = self.blocks(rows).float() / steps[part]
            return quotients.clamp_(-E4M3_MAX, E4M3_MAX).to(packed.dtype).flatten(-2)

        return by_rows(weight, packed, encode)

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.float8_e4m3fn)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        steps = stored["weight_scale"].view(torch.float8_e8m0fnu).float()
        return (self.blocks(stored["weight"].float()) * steps[..., None]).flatten(-2)


MXFP8 = Mxfp8()
