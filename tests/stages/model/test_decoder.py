import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.model.decoder import LayerwiseUnsupported, find_decoder
from tests.stages.calibrate.families import FAMILIES, SMALL, tiny_config

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def build(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "jamba", "llama4", "nemotron_h"])
def test_layers_are_found(family):
    decoder = find_decoder(build(tiny_config(family)))
    assert decoder.path == "model.layers"
    assert len(decoder.layers) == 4
    assert decoder.unused_by_text() == ("lm_head",)


def test_layers_of_the_text_model_and_not_of_a_tower_of_equal_depth():
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SMALL, **FAMILIES["gemma3"][1]},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
    )
    decoder = find_decoder(build(config))
    assert decoder.path == "model.language_model.layers"
    assert decoder.unused_by_text() == ("model.vision_tower", "lm_head")


def test_names():
    decoder = find_decoder(build(tiny_config("llama")))
    assert decoder.name(3) == "model.layers.3"
    assert decoder.layer_of("model.layers.3.mlp.up_proj.weight") == 3
    assert decoder.layer_of("model.norm.weight") is None
    assert decoder.layer_of("model.layers_norm.weight") is None


def test_layers_under_another_name_are_refused():
    model = build(AutoConfig.for_model("gpt2", n_layer=2, n_embd=32, n_head=2, vocab_size=96))
    with pytest.raises(LayerwiseUnsupported, match=r"GPT2LMHeadModel .* 2 decoder layers .*--schedule whole"):
        find_decoder(model)
