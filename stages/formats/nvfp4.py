"""NVFP4: e2m1 values in blocks of 16, an e4m3 scale per block and an f32 scale per tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from stages.formats.grids import E2M1_MAX, E4M3_MAX, decode_e2m1, encode_e2m1, round_e2m1
from stages.formats.nvfp4_search import E4M3_MIN, FOUR_OVER_SIX_MAX, LARGEST, SMALLEST, four_over_six, sweep
from stages.formats.packing import block_amax as amax_of_blocks
from stages.formats.packing import pack_e2m1
from stages.formats.quantized import constants, step
from stages.formats.weight_format import StoredTensor, WeightFormat, tensor_amax
from stages.settings import ScaleChoice

# The smallest and the largest power of two that is an e4m3 value.
E4M3_POWERS = (E4M3_MIN, 2.0**8)
MXFP4_GROUP = 32
# e4m3 codes that GPTQ tries, relative to that of amax / 6; one code is 6 to 12 %. The smaller ones clip. With
# +4 to +6 the largest weight lies near 4 instead of 6 ("four over six", arXiv 2512.02010): nothing then falls
# into the grid's widest gap.
CODE_OFFSETS = (-3, -2, -1, 0, 1, 2, 3, 4, 5, 6)
CODES = (SMALLEST, LARGEST)


@dataclass(frozen=True)
class Nvfp4(WeightFormat):
    """W = e2m1(nibble) * weight_scale * weight_scale_2; two values a byte, the even column low.

    scales: how block scales are chosen where no solver does.
    """

    block_size: int = 16
    scales: ScaleChoice = "max"

    name = "nvfp4"
    grain = "block"
    bound = E2M1_MAX
    standard_block = 16
    input_bound = E2M1_MAX * E4M3_MAX
    scale_dtype = torch.float8_e4m3fn
    tensor_leaf = "weight_scale_2"
    shared_over = "engine groups"
    candidates_count = len(CODE_OFFSETS)
    solvers = frozenset({"awq_lite", "awq_clip", "awq_full", "gptq", "local_hessian", "tune"})
    holds_together = True

    def stored(self, rows: int, columns: int) -> list[StoredTensor]:
        return [
            StoredTensor("weight", "U8", (rows, columns // 2)),
            StoredTensor("weight_scale", "F8_E4M3", (rows, columns // self.block_size)),
            StoredTensor("weight_scale_2", "F32", ()),
        ]

    def round(self, x: Tensor) -> Tensor:
        return round_e2m1(x)

    def round_input(self, x: Tensor, scale: Tensor) -> Tensor:
        """Block scales in e4m3, at most 448; a block too small for any becomes zeros, as in engines."""
        if x.is_cuda and self.block_size == self.standard_block:
            from stages.kernels.nvfp4_input import round_blocks

            return round_blocks(x, scale)
        blocks = self.blocks(x).float()
        stored = (blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * scale)).clamp_(max=E4M3_MAX)
        steps = stored.to(torch.float8_e4m3fn).float() * scale
        values = round_e2m1(blocks / steps.masked_fill(steps == 0, torch.inf))
        return (values * steps).flatten(-2).to(x.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_e2m1(codes.view(torch.uint8))

    def search_scale(self, weights: Tensor, amax: Tensor | None = None) -> Tensor | None:
        amax = tensor_amax(weights) if amax is None else amax.float()
        return self.tensor_scale(amax).masked_fill_(~(amax > 0), 1.0)

    def with_scales(self, scales: ScaleChoice) -> Self | None:
        return replace(self, scales=scales)

    def tensor_scale(self, amax: Tensor) -> Tensor:
        largest = FOUR_OVER_SIX_MAX if self.scales == "four_over_six" else E4M3_MAX
        return amax / (E2M1_MAX * largest)

    def scales_from_amax(self, amax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        assert tensor_scale is not None
        scale = amax / (E2M1_MAX * tensor_scale)
        scale.masked_fill_(scale == 0, 1.0)
        return scale.clamp_(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)

    def candidates(self, amax: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Neighbours of amax / 6 among the values that e4m3 holds."""
        assert tensor_scale is not None
        # Neighbouring positive e4m3 values are neighbouring codes.
        codes = self.scales_from_amax(amax, tensor_scale[..., 0]).view(torch.uint8).to(torch.int16)
        offsets = torch.tensor(CODE_OFFSETS, dtype=torch.int16, device=amax.device)[:, None, None]
        return (codes + offsets).clamp_(*CODES).to(torch.uint8).view(torch.float8_e4m3fn).float()

    def every_scale(self) -> Tensor | None:
        codes = torch.arange(CODES[0], CODES[1] + 1, dtype=torch.uint8)
        return codes.view(torch.float8_e4m3fn).float()

    def error_on_gpu(self, weights: Tensor, scales: Tensor, tensor_scale: Tensor | None) -> Tensor | None:
        from stages.kernels.nvfp4_error import scaled_difference

        assert tensor_scale is not None
        return scaled_difference(weights, scales, tensor_scale.flatten(1), torch.bfloat16)

    def clip_on_gpu(
        self, weights: Tensor, within: Tensor, tensor_scale: Tensor | None, ratios: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        from stages.kernels.nvfp4_clip import clip_blocks

        assert tensor_scale is not None
        return clip_blocks(weights, within, tensor_scale.flatten(), ratios)

    def sweep_on_gpu(
        self, weights: Tensor, within: Tensor, tensor_scale: Tensor | None, scales: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        from stages.kernels.nvfp4_clip import sweep_blocks

        assert tensor_scale is not None
        return sweep_blocks(weights, within, tensor_scale.flatten(), scales)

    def gptq_on_gpu(
        self, columns: Tensor, factor: Tensor, tensor_scale: Tensor | None, fixed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        from stages.kernels.gptq_block import solve_block

        assert tensor_scale is not None
        offsets = constants(CODE_OFFSETS, columns.device)
        return solve_block(columns, factor, "nvfp4", tensor_scale.flatten(), offsets)

    def weights_on_gpu(
        self, latents: Tensor, scale: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        from stages.kernels.tuned_rounding import nvfp4_weights

        assert tensor_scale is not None
        return nvfp4_weights(latents, scale, tensor_scale.flatten(), dtype)

    # As in modelopt's `quantize_mxfp4_to_nvfp4_lossless`: the largest power becomes e4m3's largest, 2^8, and
    # what is more than 2^17 below it has no e4m3 of its own.

    def powers_amax(self, largest: Tensor) -> Tensor | None:
        return largest * (E2M1_MAX * E4M3_MAX / E4M3_POWERS[1])

    def powers_block_amax(self, powers: Tensor) -> Tensor:
        return powers.mul(E2M1_MAX).repeat_interleave(MXFP4_GROUP // self.block_size, -1)

    def holds_powers(self, powers: Tensor, tensor_scale: Tensor) -> Tensor:
        scale = powers / tensor_scale
        return (scale >= E4M3_POWERS[0]) & (scale <= E4M3_POWERS[1]) & (scale.frexp().mantissa == 0.5)

    def block_scale(
        self, weight: Tensor, tensor_scale: Tensor | None, block_amax: Tensor | None = None
    ) -> Tensor | None:
        """float8_e4m3fn `[N, K/16]`."""
        assert tensor_scale is not None
        if block_amax is not None:
            return self.scales_from_amax(block_amax, tensor_scale)
        own = amax_of_blocks(weight, self.block_size)
        if self.scales == "max":
            return self.scales_from_amax(own, tensor_scale)
        return (sweep if self.scales == "mse" else four_over_six)(weight, own, tensor_scale)

    def pack(self, weight: Tensor, tensor_scale: Tensor | None, block_scale: Tensor | None) -> Tensor:
        """uint8 `[N, K/2]`."""
        assert block_scale is not None
        return pack_e2m1(weight, step(block_scale, tensor_scale))

    def encode(self, values: Tensor) -> Tensor:
        return encode_e2m1(values)

    def dequantize(self, stored: Mapping[str, Tensor]) -> Tensor:
        steps = stored["weight_scale"].float() * stored["weight_scale_2"]
        return (self.blocks(decode_e2m1(stored["weight"])) * steps[..., None]).flatten(-2)


NVFP4 = Nvfp4()
