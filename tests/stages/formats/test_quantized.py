"""A weight out of what is stored of it is the weight that was stored."""

import pytest
import torch

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, WeightFormat
from stages.formats.quantized import Quantized, round_to_nearest
from stages.formats.weight_format import tensor_amax

FORMATS = [FP8, INT4_AWQ, INT8_SQ, NVFP4]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_codes_decode_to_their_values(format: WeightFormat) -> None:
    values = format.round(torch.tensor([[-6.0, -1.5, 0.0, 0.5], [1.0, 2.0, 3.0, 4.0]]))
    codes = format.encode(values)
    assert format.decode(codes).equal(values)
    assert format.decode(codes.view(torch.int8)).equal(values)  # as a run stores them


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("share", [1.0, 1.25], ids=["own amax", "that of a group"])
def test_decoded_is_what_was_encoded(format: WeightFormat, share: float) -> None:
    weights = torch.randn(3, 8, 256, generator=torch.Generator().manual_seed(0))
    weights[1] *= 40
    amax = share * tensor_amax(weights)
    made = round_to_nearest(format, weights, amax)
    stored = made.encoded()
    found = Quantized.decoded(format, stored["values"], stored["block_scale"], amax[:, 0, 0])
    assert found.values.equal(made.values) and found.scale.dtype == format.scale_dtype
    assert found.scale.float().equal(made.scale.float())
    assert found.dequantize().equal(made.dequantize())


def test_an_amax_of_zero_decodes() -> None:
    made = round_to_nearest(NVFP4, torch.zeros(1, 2, 16))
    stored = made.encoded()
    found = Quantized.decoded(NVFP4, stored["values"], stored["block_scale"], torch.zeros(1))
    assert found.dequantize().equal(torch.zeros(1, 2, 16))
