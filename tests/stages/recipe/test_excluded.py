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


QUANTIZED = {"model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj.weight"}


def excluded(
    tensors: dict[str, TensorEntry],
    *listed: str,
    quantized: dict[str, str] = QUANTIZED,
    experts: dict[str, str] | None = None,
) -> list[str]:
    config = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": list(listed)}}
    embeddings = {"model.embed_tokens.weight"}
    found = with_all_excluded(config, tensors, quantized, embeddings, experts or {})
    names: list[str] = found["quantization"]["exclude_modules"]
    assert config["quantization"]["exclude_modules"] == list(listed)
    return names


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
        visual__attention__in_proj_weight=(24, 8),
        visual__position_embedding_table=(4, 8),
        embed_vision__embedding_projection__weight=(8, 8),
    )
    assert excluded(tensors, "lm_head") == [
        "lm_head",
        "mtp.fc",
        "mtp.layers.0.mlp.experts",
        "visual.attention",
        "embed_vision.embedding_projection",
    ]


def test_experts_one_by_one_are_named_as_engines_ask_for_them() -> None:
    found = excluded(entries(mtp__mlp__experts__0__up_proj__weight=(8, 8)))
    assert found == ["mtp.mlp.experts.0.up_proj", "mtp.mlp.experts"]


def test_patterns_count() -> None:
    assert excluded(entries(visual__blocks__0__qkv__weight=(8, 8)), "visual*") == ["visual*"]


@pytest.mark.parametrize("listed", [(), ("model.layers.0.experts",)])
def test_experts_that_lie_in_a_layer_have_another_name_in_vllm_too(listed: tuple[str, ...]) -> None:
    tensors = entries(model__layers__0__experts__gate_up_proj=(2, 16, 8))
    assert excluded(tensors, *listed) == ["model.layers.0.experts", "*layers.0.moe.experts*"]


def test_experts_in_tensors_of_linears_that_are_none() -> None:
    tensors = entries(model__layers__0__moe__input_linear__weight=(2, 16, 8))
    experts = {"model.layers.0.moe.input_linear.weight": "model.layers.0.moe.experts"}
    assert excluded(tensors, experts=experts) == ["model.layers.0.moe.experts"]


@pytest.mark.parametrize("listed", [(), ("*mlp*",)])
def test_one_name_within_another_is_refused(listed: tuple[str, ...]) -> None:
    tensors = entries(model__layers__0__mlp__up__weight=(8, 8))
    with pytest.raises(InputError, match=r"(mlp\.up|mlp\*) stays unquantized, and engines would"):
        excluded(tensors, *listed)


def test_a_recipe_without_weights_excludes_nothing() -> None:
    assert excluded(entries(mtp__fc__weight=(8, 16)), quantized={}) == []


def test_the_table_of_layers_names_what_is_quantized_alone() -> None:
    layers = {"a": {"quant_algo": "FP8"}, "tower.q": {"quant_algo": "NVFP4"}}
    config = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    found = with_all_excluded(config, {}, {"a": "a.weight"}, set(), {}, {"tower.q"})
    assert found["quantization"]["quantized_layers"] == {"a": {"quant_algo": "FP8"}}
