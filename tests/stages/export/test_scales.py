"""Scales on literal values, and against the modelopt functions they restate."""

import math
import struct

import pytest
import torch

from stages.export import scales
from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, W4A8_AWQ, WeightFormat
from stages.unify import DEAD_AMAX
from state.errors import InputError

Q, K, GATE, UP, DOWN = "layers.0.q", "layers.0.k", "experts.0.gate", "experts.0.up", "experts.0.down"


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_powers_of_the_format_maxima() -> None:
    assert NVFP4.input_scale(scalar(6.0 * 448.0)).item() == 1.0
    assert FP8.input_scale(scalar(448.0)).item() == 1.0
    assert NVFP4.tensor_scale(scalar(2688.0)).item() == 1.0
    assert FP8.tensor_scale(scalar(224.0)).item() == 0.5
    assert scales.kv_scale(scalar(896.0)).item() == 2.0
    assert INT8_SQ.input_scale(scalar(254.0)).item() == 2.0
    assert W4A8_AWQ.input_scale(scalar(448.0)).item() == 1.0
    assert W4A8_AWQ.tensor_scale(scalar(448.0)).item() == 1.0


@pytest.mark.parametrize("amax", [0.1, 3.0, 7.84375, 1e-6, 1234.5])
def test_bits_are_those_of_modelopts_quantizers(amax: float) -> None:
    from modelopt.torch.export.quant_utils import get_scaling_factor
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    fp8 = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3)))
    fp8.amax = scalar(amax)
    blocks = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    nvfp4 = TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks))
    nvfp4.amax = scalar(amax)
    assert FP8.input_scale(scalar(amax)).equal(get_scaling_factor(fp8).squeeze())
    assert NVFP4.input_scale(scalar(amax)).equal(NVFP4QTensor.get_activation_scaling_factor(nvfp4))
    second = NVFP4QTensor.get_weights_scaling_factor_2_from_quantizer(nvfp4)
    assert NVFP4.tensor_scale(scalar(amax)).equal(second)


def share(formats: dict[str, WeightFormat], amax: dict[str, float], **groups: list) -> dict[str, float]:
    arguments = {
        "same_input": [],
        "engine_fused": [],
        "fused_experts": frozenset(),
        "dead": "floor",
        "one_scale": {},
    }
    found = scales.share_weight_amax(
        {name: scalar(value) for name, value in amax.items()}, formats, **(arguments | groups)
    )
    return {
        name.removesuffix(".weight_quantizer"): value.item()
        for name, value in found.amax.items()
        if value is not None
    }


def test_nvfp4_shares_over_same_input_and_fused_groups() -> None:
    formats = dict.fromkeys((Q, K, GATE, UP), NVFP4)
    shared = share(
        formats, {Q: 1.0, K: 2.0, GATE: 4.0, UP: 3.0}, same_input=[(Q, K)], engine_fused=[(GATE, UP)]
    )
    assert shared == {Q: 2.0, K: 2.0, GATE: 4.0, UP: 4.0}


def test_fp8_shares_only_within_an_expert_stored_fused() -> None:
    formats = dict.fromkeys((Q, K, GATE, UP, DOWN), FP8)
    amax = {Q: 1.0, K: 2.0, GATE: 4.0, UP: 3.0, DOWN: 0.5}
    groups = [(Q, K), (GATE, UP)]
    fused = frozenset({GATE, UP, DOWN})
    assert share(formats, amax, engine_fused=groups, fused_experts=fused) == amax | {UP: 4.0}
    assert share(formats, amax, same_input=groups, engine_fused=groups) == amax


def test_w4a8_shares_and_formats_without_a_tensor_scale_have_none() -> None:
    w4a8, int8 = W4A8_AWQ, INT8_SQ
    formats = {Q: w4a8, K: w4a8, UP: int8, DOWN: INT4_AWQ}
    shared = share(formats, {Q: 1.0, K: 2.0, UP: 3.0, DOWN: 4.0}, same_input=[(Q, K)])
    assert shared == {Q: 2.0, K: 2.0}


def test_formats_are_never_mixed_in_a_group() -> None:
    shared = share({Q: NVFP4, K: FP8}, {Q: 1.0, K: 2.0}, same_input=[(Q, K)])
    assert shared == {Q: 1.0, K: 2.0}


def test_a_zero_weight_follows_the_policy_for_dead_values() -> None:
    assert share({Q: NVFP4}, {Q: 0.0}) == {Q: DEAD_AMAX}
    with pytest.raises(InputError, match=r"^layers\.0\.q\.weight_quantizer: amax is zero"):
        share({Q: NVFP4}, {Q: 0.0}, dead="error")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    with pytest.raises(InputError, match=rf"^layers\.0\.q: the weight's amax in the run is {bad}"):
        share({Q: NVFP4, K: NVFP4}, {Q: bad, K: 1.0}, same_input=[(Q, K)])


def test_stored_bytes() -> None:
    assert scales.stored(scalar(0.5)) == struct.pack("<f", 0.5)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_unusable_scales_are_never_stored(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite and positive"):
        scales.stored(scalar(bad))


def test_stored_vectors_keep_their_dtype() -> None:
    assert bytes(scales.stored_vector(torch.tensor([1.0, 0.5], dtype=torch.bfloat16))) == b"\x80\x3f\x00\x3f"


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_unusable_vectors_are_never_stored(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite and positive"):
        scales.stored_vector(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("weight_format", [NVFP4, FP8])
def test_experts_in_one_tensor_share_in_every_format(weight_format: WeightFormat) -> None:
    modules = [f"experts.{expert}.{leaf}" for expert in range(2) for leaf in ("gate", "up", "down")]
    amax = dict(zip(modules, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=True))
    one_scale = {name: "down" if name.endswith("down") else "both" for name in modules}
    shared = share(dict.fromkeys(modules, weight_format), amax, one_scale=one_scale)
    assert list(shared.values()) == [5.0, 5.0, 6.0, 5.0, 5.0, 6.0]
