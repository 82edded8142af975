"""Packed values, on literal tensors and against modelopt's packing."""

import torch
from modelopt.torch.export.quant_utils import pack_int4_in_uint8

from stages.solve import packing


def test_int4_puts_two_rows_in_a_byte() -> None:
    values = torch.tensor([[[1.0, -8.0], [-1.0, 7.0]]])
    # 0xF1 and 0x78, as int8.
    assert packing.pack_int4(values).tolist() == [[[-15, 120]]]


def test_int4_equals_modelopts_packing() -> None:
    values = torch.randint(-8, 8, (6, 256), generator=torch.Generator().manual_seed(0)).float()
    theirs = pack_int4_in_uint8(values, torch.ones(6, 2), 128)
    assert torch.equal(packing.pack_int4(values).view(torch.uint8), theirs)


def test_e2m1_puts_two_columns_in_a_byte() -> None:
    values = torch.tensor([[0.5, 6.0, -1.5, -0.0]])
    assert packing.pack_e2m1(values).view(torch.uint8).tolist() == [[0x71, 0x8B]]
