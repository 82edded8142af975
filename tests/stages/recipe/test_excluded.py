"""The list of excluded modules names every matrix that stays unquantized, in the checkpoint's names."""

import pytest

from stages.recipe.excluded import with_all_excluded
from state.errors import InputError
from state.source import TensorEntry


def entries(**shapes: tuple[int, ...]) -> dict[str, TensorEntry]:
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {
        name: TensorEntry(name, "BF16", shape, "model.safetensors", 0, 0) for name, shape in names.items()
    }


def excluded(tensors: dict[str, TensorEntry], *listed: str, quantized: dict[str, str]) -> list[str]:
    config = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": list(listed)}}
    found = with_all_excluded(config, tensors, quantized, {"model.embed_tokens.weight"})
    names: list[str] = found["quantization"]["exclude_modules"]
    assert config["quantization"]["exclude_modules"] == list(listed)
    return names


QUANTIZED = {"model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj.weight"}


def test_what_no_class_builds_is_added_and_what_is_listed_stays() -> None:
    tensors = entries(
        model__layers__0__mlp__up_proj__weight=(8, 8),
        model__embed_tokens__weight=(9, 8),
        model__norm__weight=(8,),
        lm_head__weight=(9, 8),
        mtp__fc__weight=(8, 16),
        mtp__embed_tokens__weight=(9, 8),
        mtp__layers__0__mlp__experts__gate_up_proj=(2, 16, 8),
        visual__patch__weight=(8, 3, 2, 2),
    )
    assert excluded(tensors, "lm_head", quantized=QUANTIZED) == [
        "lm_head",
        "mtp.fc",
        "mtp.layers.0.mlp.experts",
    ]


def test_patterns_count() -> None:
    tensors = entries(visual__blocks__0__qkv__weight=(8, 8))
    assert excluded(tensors, "visual*", quantized=QUANTIZED) == ["visual*"]


def test_experts_that_lie_in_a_layer_have_another_name_in_vllm_too() -> None:
    tensors = entries(model__layers__0__experts__gate_up_proj=(2, 16, 8))
    assert excluded(tensors, quantized=QUANTIZED) == ["model.layers.0.experts", "*.moe.experts*"]


def test_one_name_within_another_is_refused() -> None:
    tensors = entries(model__layers__0__mlp__up__weight=(8, 8))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up stays unquantized, and engines would"):
        excluded(tensors, quantized=QUANTIZED)


def test_a_recipe_without_weights_excludes_nothing() -> None:
    assert excluded(entries(mtp__fc__weight=(8, 16)), quantized={}) == []
