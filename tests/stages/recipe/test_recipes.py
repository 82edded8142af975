"""Names of recipes, and what is said of those that are none."""

import pytest

from stages.recipe.recipes import resolve
from state.errors import InputError


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVFP4", "nvfp4"),
        ("NVFP4_DEFAULT_CFG", "nvfp4"),
        ("NVFP4_AWQ_FULL_CFG", "nvfp4_awq_full"),
        ("nvfp4-awq-full", "nvfp4_awq_full"),
        ("FP8_DEFAULT_CFG", "fp8"),
        ("INT8_SMOOTHQUANT_CFG", "int8_smoothquant"),
        ("smoothquant", "int8_smoothquant"),
        ("gptq", "general/ptq/nvfp4_default-kv_none-gptq"),
        ("awq", "int4_awq or nvfp4_awq_clip or nvfp4_awq_full"),
        ("experts_only_mse", "general/ptq/nvfp4_experts_only_mse-kv_fp8_cast"),
    ],
)
def test_another_spelling_or_a_part_of_a_name_is_understood(name: str, meant: str) -> None:
    with pytest.raises(InputError) as refused:
        resolve(name)
    assert str(refused.value) == f"no recipe is called {name!r}; did you mean {meant}?"


def test_of_names_that_look_alike_what_is_served_comes_first() -> None:
    with pytest.raises(InputError, match=r"did you mean nvfp4 or "):
        resolve("nvfp5")
    with pytest.raises(InputError, match=r"did you mean general/ptq/nvfp4_default-kv_fp8 or "):
        resolve("general/ptq/nvfp4_default-kv_f8")


def test_names_like_no_other_get_the_list() -> None:
    with pytest.raises(InputError, match=r"there are \(likely served first\): fp8, ") as refused:
        resolve("zzz")
    names = str(refused.value).partition("first): ")[2].split(", ")
    served = (
        "nvfp4",
        "mxfp8",
        "w4a16_nvfp4",
        "nvfp4_awq_full",
        "w4a8_awq_beta",
        "general/ptq/nvfp4_default-kv_none-gptq",
    )
    refused_names = ("mxfp6", "nvfp4_svdquant", "mxint8")
    assert max(map(names.index, served)) < min(map(names.index, refused_names))
