"""Every recipe that modelopt ships is served, or refused by what stands in the way."""

import re
from typing import Any

import pytest

from stages.formats import TABLE
from stages.model.skeleton import Skeleton
from stages.recipe.recipes import Recipe, shipped
from stages.recipe.reference import reference_model
from stages.recipe.survey import Surveyed, bits_per_weight, survey

PRESETS_REFUSED = {
    "int8_weight_only": r"to 'int8_wo' \(.*weight_quantizer\)",
    "mxfp6": r"num_bits=\(3, 2\)' \(.*weight_quantizer\)",
    "mxint8": r"to 'int8_sq with axis=None' \(.*weight_quantizer\)",
    "nvfp4_fp8_mha": r"self_attn.p_bmm_quantizer",
    "nvfp4_svdquant": "algorithm 'svdquant'",
    "w4a8_mxfp4_fp8": r"to 'w4a8_mxfp4_fp8' \(.*weight_quantizer\)",
    "w4a8_nvfp4_fp8": r"to 'w4a8_nvfp4_fp8' \(.*weight_quantizer\)",
}
FILES_REFUSED = {
    "general/ptq/nvfp4_act_headroom-kv_fp8_cast": "algorithm 'nvfp4_act_headroom'",
    "general/qad/nvfp4_dual_lsq-mse_init-fp8_kv": "algorithm 'lsq'",
    "general/qad/nvfp4_lsq-mse_init-fp8_kv": "algorithm 'lsq'",
    "huggingface/gemma/ptq/w4a8_awq-kv_fp8_cast": "option alpha_step=1",
    "huggingface/gemma4/ptq/w4a8_awq-kv_fp8_cast": "option alpha_step=1",
    "huggingface/minimax_m3_vl/ptq/mxfp8_nvfp4_experts": "algorithm 'mse' .fp8_scale_sweep=False",
    "huggingface/minimax_m3_vl/ptq/nvfp4_experts_only": "algorithm 'mse' .fp8_scale_sweep=False",
    "huggingface/mpt/ptq/w4a8_awq-kv_fp8_cast": "option alpha_step=1",
    "huggingface/nemotron_llama/ptq/fp8_output_quant_proj": r"k_proj.output_quantizer",
    "huggingface/nemotron_llama/ptq/nvfp4_output_quant_proj": r"k_proj.output_quantizer",
    "huggingface/vit/ptq/fp8": r"self_attn.p_bmm_quantizer",
}
OTHER_KINDS = re.compile(r"/(auto_quantize|speculative_decoding|distillation)/")
"""Folders of recipes that are not for quantization after training."""


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return reference_model()


@pytest.fixture(scope="module")
def found(skeleton: Skeleton) -> dict[str, Surveyed]:
    return {name: survey(name, skeleton, stand_in=True) for name in shipped()}


def test_all_are_there(found: dict[str, Surveyed]) -> None:
    assert len(found) >= 92
    assert {
        "nvfp4",
        "nvfp4_omlp_only",
        "general/ptq/nvfp4_experts_only-kv_fp8",
        "huggingface/qwen3_5_moe/ptq/nvfp4_experts_mse-fp8_rest-kv_fp8",
        "models/moonshotai/Kimi-K3/ptq/nvfp4_experts-fp8_pb_attention",
    } <= found.keys()
    assert not [name for name in found if name.endswith(("quant_cfg", "disabled_quantizers"))]


def test_each_is_served_or_refused_by_what_stands_in_the_way(found: dict[str, Surveyed]) -> None:
    expected = PRESETS_REFUSED | FILES_REFUSED
    for name, one in found.items():
        if OTHER_KINDS.search(name):
            assert one.reason is not None and "not a post-training quantization recipe" in one.reason
        elif name in expected:
            assert one.reason is not None and re.search(expected[name], one.reason), one
        else:
            assert one.reason is None and one.bits.keys() <= TABLE.keys() and one.bits, one


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("nvfp4", "channel statistics"),
        ("w4a16_nvfp4", "nothing"),
        ("mxfp8", "nothing"),
        ("fp8_per_channel_per_token", "nothing"),
        ("general/ptq/nvfp4_weight_only-kv_fp8_cast", "nothing"),
        ("general/ptq/nvfp4_experts_only_input_scale1-kv_fp8_cast", "nothing"),
        ("int8_smoothquant", "channel statistics"),
        ("nvfp4_four_over_six", "channel statistics"),
        ("general/ptq/nvfp4_default-kv_none-gptq", "a solver pass"),
    ],
)
def test_what_it_needs(found: dict[str, Surveyed], name: str, needs: str) -> None:
    assert found[name].needs == needs


def test_rules_for_modules_that_the_model_does_not_have_count_too(found: dict[str, Surveyed]) -> None:
    ultra = found["models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6"]
    assert ultra.bits == {"fp8": 8.0, "nvfp4": 4.5} and ultra.scales == "four_over_six"
    assert ultra.cache == "fp8" and "*mixer.in_proj*weight_quantizer" in ultra.stood_in


def test_embeddings_stay_as_they_are(found: dict[str, Surveyed]) -> None:
    one = found["models/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16/ptq/nvfp4_w4a16"]
    assert one.served and one.left_out == {"model.embed_tokens": "embeddings stay as they are"}
    assert not found["nvfp4"].left_out


def test_on_a_model_of_ones_own_they_do_not(skeleton: Skeleton) -> None:
    one = survey("models/deepseek-ai/DeepSeek-V4-Pro-0813/ptq/nvfp4_experts_only", skeleton, stand_in=False)
    assert one.reason is not None and "no weight quantizer is enabled" in one.reason


def test_bits_count_scales() -> None:
    found = {name: bits_per_weight(weight) for name, weight in TABLE.items()}
    assert found == {
        "nvfp4": 4.5,
        "w4a16_nvfp4": 4.5,
        "mxfp4": 4.25,
        "mxfp8": 8.25,
        "fp8": 8.0,
        "fp8_pc_pt": 8.008,
        "fp8_pb_wo": 8.002,
        "int4_awq": 4.25,
        "w4a8_awq": 4.25,
        "int8_sq": 8.008,
    }


def test_a_recipe_that_quantizes_no_weight_is_refused(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule: dict[str, Any] = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}}
    recipe = Recipe("cache", [rule], "max", {})
    monkeypatch.setattr("stages.recipe.survey.resolve", lambda name: recipe)
    one = survey("cache", skeleton, stand_in=True)
    assert one.reason is not None and "places no quantizer on a weight" in one.reason
