"""Packing against values worked out by hand."""

import torch

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4
from stages.model.raw import raw_bytes

# e2m1 codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.


def pack_nvfp4(
    weight: torch.Tensor, amax: float, block_amax: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    tensor_scale = NVFP4.tensor_scale(torch.tensor(amax))
    scale = NVFP4.block_scale(weight, tensor_scale, block_amax)
    return NVFP4.pack(weight, tensor_scale, scale), scale


def pack_fp8(weight: torch.Tensor, amax: float) -> torch.Tensor:
    return FP8.pack(weight, FP8.tensor_scale(torch.tensor(amax)), None)


def test_nvfp4_nibbles() -> None:
    # Largest |w| is 6, so weight_scale_2 = 6 / 2688 = 1/448 and the block's scale is 6 / 6 / (1/448) = 448:
    # steps of one.
    row = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.25]
    packed, scale = pack_nvfp4(torch.tensor([row]), 6.0)
    assert scale.dtype == torch.float8_e4m3fn and scale.float().tolist() == [[448.0]]
    codes = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]]


def test_nvfp4_scales_are_per_block_of_a_row() -> None:
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[0, 16], weight[1, 0] = 6.0, 3.0, 1.5
    packed, scale = pack_nvfp4(weight, 6.0)
    # A block of zeros gets 1.0 before the cast, as modelopt writes it.
    assert scale.float().tolist() == [[448.0, 224.0], [112.0, 1.0]]
    assert packed.shape == (2, 16)
    assert [packed[0, 0].item(), packed[0, 8].item(), packed[1, 0].item(), packed[1, 8].item()] == [
        7,
        7,
        7,
        0,
    ]


def test_nvfp4_with_a_shared_larger_amax() -> None:
    # The group's amax is twice this weight's: the block's scale halves, the nibbles stay.
    packed, scale = pack_nvfp4(torch.full((1, 16), 3.0), 6.0)
    assert scale.float().tolist() == [[224.0]]
    assert set(packed.flatten().tolist()) == {0x77}


def test_the_weight_is_left_alone() -> None:
    weight = torch.tensor([[-1.0, 2.0] * 8])
    before = weight.clone()
    pack_nvfp4(weight, 2.0)
    assert weight.equal(before)


def test_fp8_values() -> None:
    weight = torch.tensor([[448.0, -224.0, 1.0, 0.0]], dtype=torch.bfloat16)
    packed = pack_fp8(weight, 448.0)
    assert packed.dtype == torch.float8_e4m3fn
    assert list(raw_bytes(packed)) == [0x7E, 0xF6, 0x38, 0x00]


def test_fp8_scales_the_largest_value_to_448() -> None:
    packed = pack_fp8(torch.tensor([[0.5, -0.25]]), 0.5)
    assert packed.float().tolist() == [[448.0, -224.0]]


def test_fp8_beyond_a_clipped_scale_is_the_largest_value() -> None:
    packed = pack_fp8(torch.tensor([[1.0, -1.0, 0.25]]), 0.5)
    assert packed.float().tolist() == [[448.0, -448.0, 224.0]]


def test_nvfp4_blocks_clipped_by_a_solver() -> None:
    weight = torch.tensor([[6.0, 3.0] * 8])
    packed, scale = pack_nvfp4(weight, 6.0, torch.tensor([[3.0]]))
    assert scale.float().tolist() == [[224.0]]
    assert set(packed.flatten().tolist()) == {0x77}  # both stop at 3.0


def test_int4_packs_two_rows_into_a_byte() -> None:
    weight = torch.zeros(2, 4)
    weight[0] = torch.tensor([7.0, -7.0, 1.0, 0.4])
    weight[1] = torch.tensor([14.0, 0.0, -14.0, 2.0])
    scale = INT4_AWQ.with_blocks(4).block_scale(weight, None)
    assert scale.tolist() == [[1.0], [2.0]]
    # Low nibble row 0, high nibble row 1: 7 and 7, -7 and 0, 1 and -7, 0 and 1.
    assert INT4_AWQ.with_blocks(4).pack(weight, None, scale).tolist() == [[0x77, 0x09, 0x91, 0x10]]


def test_int4_blocks_have_their_own_scale_and_zeros_get_one() -> None:
    weight = torch.tensor([[7.0, 0.0, 0.0, 0.0, 3.5, 1.0], [0.0, 0.0, 14.0, 0.0, 0.0, 7.0]])
    blocks = INT4_AWQ.with_blocks(2)
    assert blocks.block_scale(weight, None).tolist() == [[1.0, 1.0, 0.5], [1.0, 2.0, 1.0]]
    assert blocks.block_scale(weight, None, torch.full((2, 3), 3.5)).tolist() == [[0.5] * 3] * 2


def test_int8_has_a_scale_per_row() -> None:
    weight = torch.tensor([[127.0, -1.0, 0.5], [254.0, -254.0, 3.0], [0.0, 0.0, 0.0]])
    scale = INT8_SQ.block_scale(weight, None)
    assert scale.tolist() == [1.0, 2.0, 1.0]
    assert INT8_SQ.pack(weight, None, scale).tolist() == [[127, -1, 0], [127, -127, 2], [0, 0, 0]]
