"""How near a weight is to its source, on small matrices."""

import pytest
import torch

from stages.engines.algos import ALGOS
from stages.formats import TABLE
from stages.formats.quantized import round_to_nearest
from stages.formats.weight_format import tensor_amax
from stages.verify.dequantize import dequantized
from stages.verify.folded import explained_by, moved_scales
from stages.verify.likeness import Likeness

FORMATS = {
    "nvfp4": "NVFP4",
    "fp8": "FP8",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
}


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))


def likeness(quantized: torch.Tensor, source: torch.Tensor) -> Likeness:
    found = Likeness.of(source.shape[1])
    for mine, its in zip(quantized.split(16), source.split(16), strict=True):
        found.add(mine, its)
    return found


def test_sums_over_pieces_are_those_of_the_whole() -> None:
    q, w = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    found = likeness(q, w)
    assert found.qq.tolist() == [1.0, 5.0]
    assert found.qw.tolist() == [1.0, 1.0]
    assert found.ww.tolist() == [5.0, 2.0]
    assert found.error == pytest.approx((9 / 6) ** 0.5)  # (0, 1), (-2, -2)
    assert found.signs == 3 / 4


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "int8_sq"])
def test_rounded_weights_are_near(name: str) -> None:
    w = weight()
    assert likeness(round_to_nearest(TABLE[name], w).dequantize(), w).verdict() == "near"


def test_other_weights_are_off() -> None:
    assert likeness(weight(1), weight(2)).verdict() == "off"


@pytest.mark.parametrize("factor", [6.0, 1 / 6, -1.0])
def test_one_factor_for_all_is_off(factor: float) -> None:
    found = likeness(factor * weight(), weight())
    assert found.verdict() == "off" and found.factor == pytest.approx(factor)


def test_columns_or_rows_may_be_scaled_on_purpose() -> None:
    w = weight()
    columns, rows = torch.logspace(-1, 1, 256), torch.logspace(-1, 1, 64)[:, None]
    assert likeness(w * columns, w).verdict() == "scaled"
    assert likeness(w * rows, w).verdict() == "scaled"
    assert likeness(w * rows * columns, w).verdict() == "scaled"
    assert likeness(w * columns, w).verdict(columns.double()) == "near"


def test_a_dead_weight_is_near_a_dead_weight() -> None:
    zeros = torch.zeros(4, 4)
    assert likeness(zeros, zeros).verdict() == "near"
    assert likeness(torch.ones(4, 4), zeros).verdict() == "off"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [slice(0, 64), slice(16, 48)], ids=["all", "some"])
def test_the_readers_arithmetic_is_the_formats(name: str, rows: slice) -> None:
    format, w = TABLE[name], weight()
    second = format.tensor_scale(tensor_amax(w).reshape(())) if format.tensor_leaf is not None else None
    scale = format.block_scale(w, second)
    stored = {"weight": format.pack(w, second, scale)}
    stored |= {"weight_scale": scale} if scale is not None else {}
    stored |= {format.tensor_leaf: second} if format.tensor_leaf is not None and second is not None else {}
    found = dequantized(ALGOS[FORMATS[name]], stored, rows)
    assert torch.allclose(found, format.dequantize(stored)[rows], rtol=1e-6, atol=0)


def test_blocks_of_128_and_powers_of_two() -> None:
    codes = torch.ones(256, 128).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1)}
    assert dequantized(ALGOS["FP8_PB_WO"], stored, slice(128, 256)).unique().tolist() == [3.0]
    powers = torch.tensor([[127, 128, 126, 120]], dtype=torch.uint8)
    found = dequantized(ALGOS["MXFP8"], {"weight": codes[:1], "weight_scale": powers}, slice(0, 1))
    assert found[0, ::32].tolist() == [1.0, 2.0, 0.5, 2.0**-7]


class TestScalesOfANorm:
    def test_what_it_was_divided_by_as_it_multiplies_or_as_one_more(self) -> None:
        before, scales = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([2.0, 0.5, 4.0, 0.25])
        (found, _) = moved_scales(before, before / scales)
        assert found.tolist() == scales.tolist()
        found = moved_scales(before, (1 + before) / scales - 1)[-1]
        assert found.tolist() == scales.tolist()

    def test_one_changed_value_is_no_division(self) -> None:
        before = torch.ones(64)
        after = before.clone()
        after[3] = 2
        assert moved_scales(before, after) == []

    def test_a_weight_that_was_multiplied_with_them_proves_them(self) -> None:
        w, scales = weight(), torch.logspace(-1, 1, 256).double()
        scaled = likeness(round_to_nearest(TABLE["nvfp4"], w * scales.float()).dequantize(), w)
        found = explained_by(scaled, {"other": [scales.flip(0)], "norm": [scales]})
        assert found is not None and found[0] == "norm"
        assert explained_by(scaled, {"other": [scales.flip(0)]}) is None
        assert explained_by(likeness(w, w), {"norm": [scales]}) is None
