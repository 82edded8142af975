"""Refuses a configuration that the checkpoint can't be of, before transformers builds what it asks for.

A model is built on the meta device without memory for weights, but a million layers are a million objects. No
family is known here: counts are compared with the names and shapes of the tensors.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from state.errors import InputError
from state.naming import naming
from state.source import TensorEntry, read_json

LAYER_COUNT = re.compile(r"(num|n)_(\w+_)?layers?")
EXPERT_COUNT = re.compile(r"(\w+_)?experts")
ALWAYS_POSSIBLE = 256
"""Layers that a configuration may have whatever the tensors are: it may speak of parts that were left out."""

CONFIG, TOKENIZER = "config.json", "tokenizer.json"

LARGEST_ID = 1 << 24
"""Of a token; vocabularies end far below."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, as it is. Raises InputError where it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no {CONFIG}; MODEL must be a Hugging Face model folder or a hub id")
    with naming(path):
        content = read_json(path, path.read_bytes(), unique=False)
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object")
    return content


def require_possible_counts(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Raises InputError where config.json counts more layers or experts than the tensors can belong to."""
    layers = max([ALWAYS_POSSIBLE, *(number + 1 for name in tensors for number in _numbers(name))])
    experts = max([len(tensors), *(size for entry in tensors.values() for size in entry.shape)])
    for name, value in _leaves("", read_config(folder)):
        key = name.rpartition(".")[2]
        for pattern, most in ((LAYER_COUNT, layers), (EXPERT_COUNT, experts)):
            if pattern.fullmatch(key) and value > most:
                raise InputError(
                    f"{folder / CONFIG}: {name} is {value}, and the checkpoint has no tensors for so many "
                    f"({most} at most). Download both again from one place."
                )


def require_possible_sizes(
    folder: Path,
    model: nn.Module,
    parameter_of: Mapping[str, tuple[str, int]],
    tensors: Mapping[str, TensorEntry],
) -> None:
    """Raises InputError where a parameter is larger than all the tensors that it is made from."""
    given: dict[str, int] = {}
    for tensor, (parameter, _) in parameter_of.items():
        given[parameter] = given.get(parameter, 0) + prod(tensors[tensor].shape)
    for name, value in model.state_dict().items():
        if name in given and value.numel() > given[name]:
            raise InputError(
                f"{folder / CONFIG} asks for {name} of shape {list(value.shape)}, and the checkpoint has "
                f"{given[name]:,} of its {value.numel():,} values. Download both again from one place."
            )


def require_possible_ids(folder: Path) -> None:
    """Raises InputError where tokenizer.json numbers a token so high that loading would take all memory."""
    path = folder / TOKENIZER
    if not path.is_file():
        return
    with naming(path):
        content = read_json(path, path.read_bytes(), unique=False)
    for name, value in _leaves("", content):
        if value > LARGEST_ID:
            raise InputError(f"{path}: {name[:80]!r} is {value}, which can't be the number of a token")


def _numbers(name: str) -> Iterator[int]:
    return (int(part) for part in name.split(".") if part.isascii() and part.isdigit())


def _leaves(name: str, value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, item)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _leaves(f"{name}[{position}]", item)
    elif type(value) is int:
        yield name, value
