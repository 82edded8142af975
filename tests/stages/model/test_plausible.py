"""Configurations that a checkpoint can't be of."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.model.plausible import (
    read_config,
    require_possible_counts,
    require_possible_ids,
    require_possible_sizes,
)
from state.errors import InputError
from state.source import TensorEntry


def entry(name: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, "F32", shape, "model.safetensors", 0, 4)


TENSORS = {
    one.name: one
    for one in (entry("model.embed.weight", 2000, 8), entry("model.layers.299.mlp.experts.3.up.weight", 8, 8))
}


def config(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_hidden_layers": 301}, r"num_hidden_layers is 301, .* \(300 at most\)"),
        ({"n_layer": 10**6}, "n_layer is 1000000"),
        ({"text_config": {"num_decoder_layers": 10**9}}, "text_config.num_decoder_layers is"),
        ({"num_experts": 2001}, r"num_experts is 2001, .* \(2000 at most\)"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is"),
        ({"a": [{"num_local_experts": 10**9}]}, "num_local_experts is"),
    ],
)
def test_more_layers_or_experts_than_tensors_are_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        require_possible_counts(config(tmp_path, json.dumps(content)), TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        {"num_hidden_layers": 300, "num_experts": 2000},
        {"vision_config": {"num_hidden_layers": 256}},
        {"max_window_layers": 10**6, "rope_theta": 10**10, "max_position_embeddings": 10**7},
        {"num_hidden_layers": "many", "num_experts": None, "n_layer": 4.5},
    ],
)
def test_other_numbers_are_not_judged(tmp_path: Path, content: object) -> None:
    require_possible_counts(config(tmp_path, json.dumps(content)), TENSORS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed JSON"),
        ("[1]", "is no JSON object"),
        ('{"a": ' * 10_000 + "1" + "}" * 10_000, "malformed JSON"),
        ('{"a": ' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
        ('{"a": ' + "1" * 5000 + "}", "malformed JSON"),
    ],
    ids=["empty", "list", "deep", "65", "digits"],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(config(tmp_path, text))


def test_a_configuration_may_name_something_twice(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, '{"a": 1, "a": 2}')) == {"a": 2}


def test_a_parameter_is_no_larger_than_what_it_is_made_from(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(8, 3, bias=False)
    halves = {"a": entry("a", 1, 8), "b": entry("b", 2, 8)}
    sources = {"a": ("weight", 0), "b": ("weight", 1)}
    require_possible_sizes(tmp_path, model, sources, halves)
    with pytest.raises(InputError, match=r"weight of shape \[3, 8\], .* has 16 of its 24 values"):
        require_possible_sizes(tmp_path, model, sources, halves | {"b": entry("b", 1, 8)})


def test_a_token_s_number_has_an_end(tmp_path: Path) -> None:
    require_possible_ids(tmp_path)
    vocabulary = {"model": {"vocab": {"a": 0, "b": 200_000}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    require_possible_ids(tmp_path)
    vocabulary["model"]["vocab"]["b"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match=r"model.vocab.b' is 2147483648"):
        require_possible_ids(tmp_path)
