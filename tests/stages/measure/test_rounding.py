"""Inputs as engines round them, on literal values."""

import pytest
import torch
from torch import nn

from stages.measure.rounding import Rounded, fp8, fp8_of_token, int8, mxfp8, nvfp4, rounding

ONE = torch.tensor(1.0)


def test_nvfp4_is_the_nearest_value_under_a_scale_of_each_block() -> None:
    block = torch.tensor([6.0, 5.1, 4.9, 2.4, 1.3, 0.7, 0.2, -3.4, *[0.0] * 8])
    found = nvfp4(torch.cat([block, 2 * block])[None], ONE)
    rounded = torch.tensor([6.0, 6.0, 4.0, 2.0, 1.5, 0.5, 0.0, -3.0, *[0.0] * 8])
    assert found.tolist() == [torch.cat([rounded, 2 * rounded]).tolist()]


def test_fp8_cuts_off_what_lies_beyond_its_scale() -> None:
    assert fp8(torch.tensor([500.0, 1.0, 1.06, -0.0029]), ONE).tolist() == [448.0, 1.0, 1.0, -0.001953125]
    assert fp8(torch.tensor([500.0]), torch.tensor(2.0)).tolist() == [512.0]


def test_fp8_of_a_token_scales_each_by_its_largest() -> None:
    found = fp8_of_token(torch.tensor([[448.0, 1.0], [0.448, 0.001], [0.0, 0.0]]))
    assert found[0].tolist() == [448.0, 1.0]
    assert found[1].tolist() == pytest.approx([0.448, 0.001])
    assert found[2].tolist() == [0.0, 0.0]


def test_int8_rounds_to_whole_steps() -> None:
    assert int8(torch.tensor([1.4, 1.6, 200.0, -200.0]), ONE).tolist() == [1.0, 2.0, 127.0, -128.0]


def test_mxfp8_takes_the_least_power_of_two_that_cuts_nothing_off() -> None:
    block = torch.zeros(64)
    block[0], block[1], block[32] = 449.0, 3.0, 2.0**-130
    found = mxfp8(block)
    assert found[:2].tolist() == [448.0, 3.0]
    assert found[32].item() < 2.0**-129


def test_dtypes_stay() -> None:
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    for done in (
        rounding("NVFP4", ONE, None),
        rounding("W8A8_SQ_PER_CHANNEL", ONE, torch.ones(32)),
        rounding("MXFP8", None, None),
        rounding("FP8_PER_CHANNEL_PER_TOKEN", None, None),
    ):
        assert done is not None and done(x).dtype == torch.bfloat16


@pytest.mark.parametrize("algo", ["W4A16_NVFP4", "W4A16_AWQ", "W8A16", "FP8_PB_WO"])
def test_weights_alone_leave_inputs_alone(algo: str) -> None:
    assert rounding(algo, ONE, None) is None


def test_an_awq_scale_is_taken_before_rounding() -> None:
    done = rounding("W8A8_SQ_PER_CHANNEL", ONE, torch.tensor([10.0, 1.0]))
    assert done is not None
    assert done(torch.tensor([[0.14, 1.4]])).tolist() == [pytest.approx([0.1, 1.0])]


def test_only_what_meets_the_weight_is_rounded() -> None:
    rounded, plain = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    storage = rounded.weight.untyped_storage().data_ptr()
    x = torch.tensor([[1.4, 0.6, 0.2, 2.5]])
    with torch.no_grad(), Rounded({storage: torch.round}, None, None) as done:
        assert done.unreached == 1
        assert torch.equal(rounded(x), torch.round(x) @ rounded.weight.T)
        assert torch.equal(plain(x), x @ plain.weight.T)
    assert (done.unreached, done.unattended) == (0, False)


def test_keys_and_values_are_rounded_where_attention_sees_them() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    attend = nn.functional.scaled_dot_product_attention
    with Rounded({}, torch.tensor(0.5), torch.tensor(0.25)) as done:
        assert done.unattended
        found = attend(q, k, v, is_causal=True)
    assert not done.unattended
    assert torch.equal(
        found, attend(q, fp8(k, torch.tensor(0.5)), fp8(v, torch.tensor(0.25)), is_causal=True)
    )
