"""The grids and scales of each format, against literal values and modelopt's packing."""

import pytest
import torch
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor, NVFP4QTensor
from torch.testing import assert_close

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, grids
from stages.formats.quantized import round_to_nearest

EXACT = {"rtol": 0, "atol": 0}


def test_round_e2m1_ties_go_to_the_even_mantissa():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, -0.75, -2.5, -9.0, 0.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -1.0, -2.0, -6.0, 0.0])
    assert_close(grids.round_e2m1(x), expected, **EXACT)


def test_round_e2m1_down_ties_go_to_zero_which_is_negative():
    x = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, -0.75, -2.5, 0.0])
    expected = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 6.0, -0.5, -2.0, -0.0])
    found = grids.round_e2m1_down(x)
    assert_close(found, expected, **EXACT)
    assert found.signbit().equal(expected.signbit())


def test_powers_of_two():
    amax = torch.tensor([448.0, 449.0, 224.0, 1.0, 0.0])
    found = grids.power_of_two(amax, 448.0)
    assert found.float().tolist() == [1.0, 2.0, 0.5, 2.0**-8, 2.0**-127]
    assert found.view(torch.uint8).tolist() == [127, 128, 126, 119, 0]


def test_round_e2m1_leaves_its_input():
    x = torch.tensor([-0.6, 2.2])
    grids.round_e2m1(x)
    assert_close(x, torch.tensor([-0.6, 2.2]), **EXACT)


def nvfp4_by_modelopt(weight: torch.Tensor, double_scale: torch.Tensor) -> torch.Tensor:
    packed, scale, _ = NVFP4QTensor.quantize(weight.clone(), 16, weights_scaling_factor_2=double_scale)
    return packed.dequantize(
        dtype=torch.float32, scale=scale, double_scale=double_scale, block_sizes={-1: 16}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nvfp4_equals_modelopts_packing(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(3, 32, 64) * torch.logspace(-6, 1, 64)).to(dtype)
    weight[0, 3, 16:32] = 0
    weight[1] *= 1e-3
    shared = NVFP4.search_scale(weight)
    quantized = round_to_nearest(NVFP4, weight)
    for expert in range(3):
        scale = NVFP4QTensor.get_weights_scaling_factor_2(weight[expert])
        assert_close(shared[expert, 0, 0], scale, **EXACT)
        block, _ = NVFP4QTensor.get_weights_scaling_factor(weight[expert], 16, scale)
        assert_close(quantized.scale[expert].float(), block.float(), **EXACT)
        assert_close(quantized.dequantize()[expert], nvfp4_by_modelopt(weight[expert], scale), **EXACT)


def test_nvfp4_with_a_clipped_amax_equals_modelopts_packing():
    weight = torch.linspace(-3, 3, 64).view(1, 2, 32)
    amax = torch.tensor([[[1.5]]])
    double_scale = torch.tensor(1.5 / 2688)
    quantized = round_to_nearest(NVFP4, weight, amax)
    # Blocks beyond the clipped amax sit at the largest e4m3 scale.
    assert quantized.scale.float().tolist() == [[[448.0, 448.0], [448.0, 448.0]]]
    assert_close(quantized.dequantize()[0], nvfp4_by_modelopt(weight[0], double_scale), **EXACT)


def test_nvfp4_scales_of_a_zero_block_and_a_zero_tensor():
    weight = torch.zeros(2, 1, 32)
    weight[0, 0, 0] = 6.0
    quantized = round_to_nearest(NVFP4, weight)
    assert quantized.scale.float().tolist() == [[[448.0, 1.0]], [[1.0, 1.0]]]
    assert_close(quantized.tensor_scale.flatten(), torch.tensor([6.0 / 2688, 1.0]), **EXACT)
    assert_close(quantized.dequantize(), weight, **EXACT)


def test_int4_values_equal_modelopts_packing():
    torch.manual_seed(0)
    weight = torch.randn(2, 4, 256)
    weight[1, 2, 128:] = 0
    quantized = round_to_nearest(INT4_AWQ, weight)
    assert quantized.scale.shape == (2, 4, 2)
    packed = pack_int4_in_uint8(weight, quantized.scale, 128)
    low, high = (packed & 0xF).to(torch.int8), (packed >> 4).to(torch.int8)
    unpacked = torch.stack([low, high], dim=2).flatten(1, 2)
    unpacked = torch.where(unpacked > 7, unpacked - 16, unpacked)
    assert_close(quantized.values, unpacked.float(), **EXACT)


def test_int8_values_equal_modelopts_packing():
    torch.manual_seed(0)
    weight = torch.randn(4, 48)
    quantized = round_to_nearest(INT8_SQ, weight)
    packed, scales = INT8QTensor.quantize(weight, axis=0)
    assert_close(quantized.scale, scales.view(4, 1), **EXACT)
    assert_close(quantized.values, packed._quantized_data.float(), **EXACT)


def test_fp8_values_equal_modelopts_packing():
    torch.manual_seed(0)
    weight = torch.randn(4, 48)
    quantized = round_to_nearest(FP8, weight[None])
    packed, scale = FP8QTensor.quantize(weight, scales=weight.abs().amax() / 448)
    assert_close(quantized.scale.flatten(), scale.view(1), **EXACT)
    assert_close(quantized.values[0], packed._quantized_data.float(), **EXACT)


def test_partial_blocks_are_refused():
    with pytest.raises(
        ValueError, match="int4_awq needs a multiple of 128 input features, this weight has 192"
    ):
        round_to_nearest(INT4_AWQ, torch.ones(1, 2, 192))
