"""The codes of values on a grid, on literal tensors and against modelopt's packing."""

import torch
from modelopt.torch.export.quant_utils import pack_int4_in_uint8

from stages.formats.grids import decode_e2m1, decode_int4, encode_e2m1, encode_int4


def test_int4_puts_two_rows_in_a_byte() -> None:
    values = torch.tensor([[[1.0, -8.0], [-1.0, 7.0]]])
    codes = encode_int4(values)
    assert codes.dtype == torch.uint8 and codes.tolist() == [[[0xF1, 0x78]]]
    assert decode_int4(codes).equal(values)


def test_int4_equals_modelopts_packing() -> None:
    values = torch.randint(-8, 8, (6, 256), generator=torch.Generator().manual_seed(0)).float()
    assert encode_int4(values).equal(pack_int4_in_uint8(values, torch.ones(6, 2), 128))
    assert decode_int4(encode_int4(values)).equal(values)


def test_e2m1_puts_two_columns_in_a_byte() -> None:
    values = torch.tensor([[0.5, 6.0, -1.5, -0.0]])
    codes = encode_e2m1(values)
    assert codes.dtype == torch.uint8 and codes.tolist() == [[0x71, 0x8B]]
    assert decode_e2m1(codes).equal(values) and decode_e2m1(codes).signbit().tolist() == [
        [False, False, True, True]
    ]


def test_every_e2m1_code_decodes_to_its_value() -> None:
    low_then_high = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert decode_e2m1(low_then_high).tolist() == [magnitudes + [-value for value in magnitudes]]
