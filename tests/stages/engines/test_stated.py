"""What configurations say, and whether both say the same."""

import pytest
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from stages.engines.stated import Stated, differences, group_faults, inline, separate

FLAT = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
LAYERS = {"a.q": {"quant_algo": "FP8"}, "a.up": {"quant_algo": "NVFP4", "group_size": 16}}
MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "kv_cache_quant_algo": None,
    "quantized_layers": LAYERS,
    "exclude_modules": [],
}


@pytest.mark.parametrize("content", [FLAT, MIXED, {"quant_algo": "FP8", "exclude_modules": ["a*"]}])
def test_both_forms_that_modelopt_writes_say_the_same(content: dict[str, object]) -> None:
    written = convert_hf_quant_config_format({"quantization": content})
    assert differences(inline(written), separate(content)) == []
    assert group_faults(written, inline(written)) == []


def test_every_difference_is_named() -> None:
    other = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "NVFP4",
        "exclude_modules": ["mtp.fc"],
        "group_size": 32,
    }
    assert differences(separate(FLAT), separate(other)) == [
        "quant_algo: NVFP4 and FP8",
        "group_size: 16 and 32",
        "KV cache: FP8 and NVFP4",
        "lm_head is left unquantized by config.json alone",
        "mtp.fc is left unquantized by hf_quant_config.json alone",
    ]


def test_a_group_size_that_is_left_out_is_the_formats() -> None:
    assert differences(Stated("NVFP4", 16, (), None), Stated("NVFP4", None, (), None)) == []


def test_layers_that_are_in_no_group() -> None:
    written = convert_hf_quant_config_format({"quantization": MIXED})
    written["config_groups"]["group_0"]["targets"] = []
    assert group_faults(written, inline(written)) == ["a.q is in no group (1 such)"]


def test_bits_of_another_format() -> None:
    written = convert_hf_quant_config_format({"quantization": FLAT})
    written["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    assert group_faults(written, inline(written)) == ["group_0 has weights of 8 bits, NVFP4 has 4"]
