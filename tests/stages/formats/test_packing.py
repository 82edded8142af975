"""Packing gives modelopt's bytes: of hard values, of all that two bytes can hold, of random ones."""

from collections.abc import Iterator

import pytest
import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

from stages.formats import (
    FP8,
    FP8_PB_WO,
    FP8_PC_PT,
    INT4_AWQ,
    INT8_SQ,
    MXFP4,
    MXFP8,
    NVFP4,
    W4A8_AWQ,
    W4A16_NVFP4,
    WeightFormat,
)
from stages.formats.nvfp4 import Nvfp4
from stages.formats.packing import spans
from stages.formats.weight_format import tensor_amax

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = {
    "nvfp4": NVFP4,
    "fp8": FP8,
    "int4": INT4_AWQ,
    "int8": INT8_SQ,
    "w4a8": W4A8_AWQ,
    "w4a16": W4A16_NVFP4,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "per channel": FP8_PC_PT,
    "blocks": FP8_PB_WO,
}
MODELOPTS = {
    MXFP8: MXFP8QTensor.get_weights_scaling_factor,
    MXFP4: lambda weight: MXFP4QTensor.quantize(weight, 32)[1].view(len(weight), -1),
    FP8_PB_WO: lambda weight: FP8QTensor.quantize(weight.float(), block_sizes={-1: 128, -2: 128})[1],
}
"""modelopt's scales."""
# Halfway between neighbours of e2m1, and the neighbours.
HARD = torch.cat([torch.arange(0, 7.5, 0.25), torch.tensor([1e30])])
SCALES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""All positive values of e4m3."""

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


def by_modelopt(
    format: WeightFormat, weight: torch.Tensor, tensor_scale: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    if format is FP8:
        bound = 448.0 * tensor_scale
        weight, scale = weight.clamp(-bound, bound), tensor_scale
    more = (tensor_scale, format.block_size) if format.block_size else ()
    return to_quantized_weight(weight.clone(), scale, format.name, *more)


def require_equal_packing(format: WeightFormat, weight: torch.Tensor) -> None:
    tensor_scale = None
    if format.tensor_leaf is not None:
        tensor_scale = format.tensor_scale(tensor_amax(weight).reshape(()))
    scale = format.block_scale(weight, tensor_scale)
    if isinstance(format, Nvfp4):
        theirs = NVFP4QTensor.get_weights_scaling_factor(weight, 16, tensor_scale)[0]
        assert scale.view(torch.uint8).equal(theirs.view(torch.uint8))
    if format in MODELOPTS:
        assert scale.flatten().equal(MODELOPTS[format](weight).flatten())
    packed = format.pack(weight, tensor_scale, scale)
    expected = by_modelopt(format, weight, tensor_scale, scale)
    assert packed.dtype == expected.dtype and packed.is_contiguous()
    assert packed.view(torch.uint8).equal(expected.view(torch.uint8))


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a dtype of two bytes, `[k, 16]`."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    return values[: len(values) // 16 * 16].view(-1, 16)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """The values, with what comes right before and after each, of either sign."""
    below, above = (values.nextafter(torch.full_like(values, end)) for end in (-torch.inf, torch.inf))
    signed = torch.cat([values, below, above])
    return torch.cat([signed, -signed])


@each_dtype
def test_nvfp4_at_every_tie_under_every_scale(dtype: torch.dtype) -> None:
    quotients = neighbours(HARD.to(dtype))
    for tensor_scale in torch.tensor([1.0, 0.25, 0.0037]):
        weight = (SCALES.float()[:, None] * tensor_scale * quotients.float()).to(dtype)
        weight = weight.nan_to_num(0.0, 0.0, 0.0).repeat_interleave(16, 1)
        scale = SCALES[:, None].expand(-1, weight.shape[1] // 16).contiguous()
        ours = NVFP4.pack(weight, tensor_scale, scale)
        assert ours.equal(by_modelopt(NVFP4, weight, tensor_scale, scale))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_nvfp4_of_every_number_of_two_bytes(dtype: torch.dtype) -> None:
    weight = every_number(dtype)
    for number, scale in enumerate(SCALES.view(torch.uint8)):
        tensor_scale = torch.tensor(2.0 ** (number % 5 - 9)) * (1 + number % 3 / 3)
        blocks = scale.expand(len(weight), 1).contiguous().view(torch.float8_e4m3fn)
        ours = NVFP4.pack(weight, tensor_scale, blocks)
        assert ours.equal(by_modelopt(NVFP4, weight, tensor_scale, blocks))


@each_dtype
def test_nvfp4_scales_at_every_boundary_of_e4m3(dtype: torch.dtype) -> None:
    codes = SCALES.float()
    halfway = (codes[1:] + codes[:-1]) / 2
    for tensor_scale in torch.tensor([1.0, 1 / 448, 0.0037, 1e-30]):
        steps = torch.cat([codes, halfway, torch.tensor([0.0, 460.0, 500.0, 1e-4])])
        amax = neighbours((6.0 * tensor_scale * steps).to(dtype))
        weight = torch.zeros(len(amax), 32, dtype=dtype)
        weight[:, 3], weight[:, 20] = amax, -amax.flip(0)
        ours = NVFP4.block_scale(weight, tensor_scale)
        theirs = NVFP4QTensor.get_weights_scaling_factor(weight, 16, tensor_scale)[0]
        assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))
        assert NVFP4.pack(weight, tensor_scale, ours).equal(by_modelopt(NVFP4, weight, tensor_scale, ours))


def test_nvfp4_under_steps_that_vanish() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-40, -1e-40] * 4, [1.0, -1.0, 0.0, -0.0] * 4])
    scale, tensor_scale = torch.full((2, 1), 2.0**-9).to(torch.float8_e4m3fn), torch.tensor(1e-44)
    ours = NVFP4.pack(weight, tensor_scale, scale)
    assert ours.equal(by_modelopt(NVFP4, weight, tensor_scale, scale))


@each_dtype
def test_fp8_at_every_boundary(dtype: torch.dtype) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([449.0, 464.0, 500.0])])
    for tensor_scale in torch.tensor([1.0, 2.0**-9, 0.0037, 1e-30]):
        weight = neighbours((values * tensor_scale).to(dtype))[None]
        ours = FP8.pack(weight, tensor_scale, None)
        assert ours.view(torch.uint8).equal(by_modelopt(FP8, weight, tensor_scale, None).view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_fp8_of_every_number_of_two_bytes(dtype: torch.dtype) -> None:
    for amax in (1e-3, 0.37, 6.0, 448.0):
        weight, scale = every_number(dtype), FP8.tensor_scale(torch.tensor(amax))
        ours = FP8.pack(weight, scale, None)
        assert ours.view(torch.uint8).equal(by_modelopt(FP8, weight, scale, None).view(torch.uint8))


@each_dtype
def test_powers_of_two_at_every_boundary(dtype: torch.dtype) -> None:
    powers = torch.arange(-150, 128).double().exp2()
    for bound, format in ((448.0, MXFP8), (6.0, MXFP4)):
        amax = neighbours((powers * bound).to(dtype))
        amax = amax[amax.isfinite()]
        weight = torch.zeros(len(amax), 32, dtype=dtype)
        weight[:, 3] = amax
        assert format.block_scale(weight, None).equal(MODELOPTS[format](weight))


@each_dtype
def test_mx_at_every_tie(dtype: torch.dtype) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([449.0, 464.0, 500.0])])
    for values, format in ((halfway, MXFP8), (HARD, MXFP4)):
        weight = neighbours(values.to(dtype)).nan_to_num(0.0, 0.0, 0.0)
        weight = torch.cat([weight, weight.new_zeros(-len(weight) % 32)]).view(-1, 32)
        for scaled in (weight, weight * 2.0**-9, weight * 2.0**-20):
            require_equal_packing(format, scaled)


@pytest.mark.parametrize("columns", [256, 192])
def test_square_blocks_at_the_edges(columns: int) -> None:
    weight = torch.randn(200, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = FP8_PB_WO.block_scale(weight, None)
    theirs, modelopts = FP8QTensor.quantize(weight.float(), block_sizes={-1: 128, -2: 128})
    assert scale.shape == (2, 1, 2, 1) and scale.flatten().equal(modelopts.flatten())
    ours = FP8_PB_WO.pack(weight, None, scale)
    assert ours.view(torch.uint8).equal(theirs._quantized_data.view(torch.uint8))


@pytest.mark.parametrize("format", [INT4_AWQ, INT8_SQ], ids=["int4", "int8"])
@each_dtype
def test_integers_at_every_tie(format: WeightFormat, dtype: torch.dtype) -> None:
    quotients = neighbours((torch.arange(-260, 260) / 2).to(dtype))
    quotients = torch.cat([quotients, quotients.new_zeros(-len(quotients) % 128)]).repeat(2, 1)
    width = quotients.shape[1] // 128
    for step in (1.0, 0.37, 3e-5):
        weight = (quotients.float() * step).to(dtype)
        scale = torch.full((2, width) if format.block_size else (2,), step)
        assert format.pack(weight, None, scale).equal(by_modelopt(format, weight, None, scale))


def random_weights(values: int, seed: int) -> Iterator[torch.Tensor]:
    """Weights of 2^21 values, of all dtypes, whose rows and columns differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(-(-values // 2**21)):
        weight = torch.randn(2048, 1024, generator=generator)
        weight *= torch.logspace(-3, 1, 1024)[torch.randperm(1024, generator=generator)]
        weight[::97] *= 1e-4
        weight[1::89, 128:256] = 0
        yield weight.to(FLOATS[number % 3])


@each_format
def test_ten_million_random_values(format: WeightFormat) -> None:
    for weight in random_weights(10**7, 0):
        require_equal_packing(format, weight)


@pytest.mark.long
@each_format
def test_a_hundred_million_random_values(format: WeightFormat) -> None:
    for weight in random_weights(10**8, 1):
        require_equal_packing(format, weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_format
def test_a_gpu_gives_the_same_bytes(format: WeightFormat) -> None:
    for weight in random_weights(10**8, 2):
        tensor_scale = None
        if format.tensor_leaf is not None:
            tensor_scale = format.tensor_scale(tensor_amax(weight).reshape(()))
        shared = None if tensor_scale is None else tensor_scale.cuda()
        scale, on_gpu = format.block_scale(weight, tensor_scale), format.block_scale(weight.cuda(), shared)
        if scale is not None:
            assert scale.float().equal(on_gpu.float().cpu())
        packed, there = format.pack(weight, tensor_scale, scale), format.pack(weight.cuda(), shared, on_gpu)
        assert packed.view(torch.uint8).equal(there.view(torch.uint8).cpu())


@pytest.mark.parametrize("format", [NVFP4, FP8], ids=["nvfp4", "fp8"])
@each_dtype
def test_experts_in_one_tensor(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = format.tensor_scale(weight.abs().amax().float() / 2)
    blocks = NVFP4.block_scale(weight.flatten(0, 1), scale).view(3, 32, 4) if format is NVFP4 else None
    ours = format.pack(weight, scale, blocks)
    assert ours.view(torch.uint8).equal(by_modelopt(format, weight, scale, blocks).view(torch.uint8))


def test_a_weight_that_is_not_contiguous() -> None:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).T
    for format in (NVFP4, FP8, INT4_AWQ, INT8_SQ):
        require_equal_packing(format, weight)


def test_pieces_are_whole_rows_and_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.formats.packing.AT_ONCE", 1)
    assert [part.start for part in spans(5, 10_000, torch.device("cpu"))] == [0, 1, 2, 3, 4]
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    for format in FORMATS.values():
        require_equal_packing(format, weight)
