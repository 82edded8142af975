"""The class that is built is the one that config.json names."""

import pytest
from transformers import AutoConfig, PretrainedConfig

from stages.model.build import build_meta_model
from state.errors import InputError

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def llama(*architectures: str) -> PretrainedConfig:
    return AutoConfig.for_model("llama", **TEXT, architectures=list(architectures))


def test_a_text_model() -> None:
    config = llama("LlamaForCausalLM")
    model = build_meta_model(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training and all(parameter.is_meta for parameter in model.parameters())
    assert model.config is not config


def test_without_architectures_the_causal_language_model_is_taken() -> None:
    assert type(build_meta_model(llama())).__name__ == "LlamaForCausalLM"


def test_a_wrapper_with_towers_is_built_whole() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=TEXT,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        architectures=["Gemma3ForConditionalGeneration"],
    )
    names = {name.partition(".layers")[0] for name, _ in build_meta_model(config).named_modules()}
    assert any("vision_tower" in name for name in names)
    assert any("language_model" in name for name in names)


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_what_computes_no_next_token_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} computes no next token"):
        build_meta_model(llama(name))


def test_a_class_that_transformers_lacks_is_refused() -> None:
    with pytest.raises(InputError, match=r"transformers .* has no NewestForConditionalGeneration"):
        build_meta_model(llama("NewestForConditionalGeneration"))


def test_a_class_of_the_model_s_own_needs_consent() -> None:
    config = llama("OwnForCausalLM")
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    with pytest.raises(InputError, match=r"OwnForCausalLM .* allow it with --trust-remote-code"):
        build_meta_model(config)
