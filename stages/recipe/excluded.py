"""The list of modules that engines must leave alone, completed.

modelopt lists the linears that its quantizers pass over. A checkpoint may hold more matrices that stay as
they are: those of MTP layers and others that the model class never builds. An engine that builds such a
module without finding it on the list expects it quantized, and refuses it or reads BF16 as codes.
"""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from state.errors import InputError
from state.source import TensorEntry

MOE_EXPERTS = "*.moe.experts*"
"""What vLLM calls experts that lie directly in a decoder layer on the hub (Gemma 4)."""


def with_all_excluded(
    hf_quant_config: dict[str, Any],
    tensors: Mapping[str, TensorEntry],
    quantized: Mapping[str, str],
    embeddings: Collection[str],
) -> dict[str, Any]:
    """modelopt's quantization config with every unquantized matrix of the checkpoint on its list.

    Args:
        quantized: module that is quantized → the hub tensor that holds its weight.
        embeddings: hub tensors of embeddings, which engines read as they are.
    Raises InputError where an entry would also name a quantized module to an engine.
    """
    quantization = hf_quant_config.get("quantization", {})
    if "exclude_modules" not in quantization or not quantized:
        return hf_quant_config
    listed = list(quantization["exclude_modules"])
    stored = set(quantized.values())
    for name, entry in tensors.items():
        if name in stored or name in embeddings:
            continue
        module = _module(name, entry)
        if module is None or any(fnmatchcase(module, pattern) for pattern in listed):
            continue
        listed.append(module)
        if _lies_in_a_layer(module) and MOE_EXPERTS not in listed:
            listed.append(MOE_EXPERTS)
    _refuse_ambiguous(listed, quantized)
    return hf_quant_config | {"quantization": quantization | {"exclude_modules": listed}}


def _module(tensor: str, entry: TensorEntry) -> str | None:
    """The module that an engine would ask about for a tensor; None for what is no matrix of a linear."""
    parent, _, leaf = tensor.rpartition(".")
    if len(entry.shape) == 2 and leaf == "weight":
        return None if "embed" in parent.rpartition(".")[2] else parent
    if len(entry.shape) == 3 and parent.rpartition(".")[2].endswith("experts"):
        return parent
    return None


def _lies_in_a_layer(module: str) -> bool:
    parent, _, leaf = module.rpartition(".")
    return leaf == "experts" and parent.rpartition(".")[2].isdigit()


def _refuse_ambiguous(listed: Iterable[str], quantized: Iterable[str]) -> None:
    """vLLM takes an entry that is part of a module's name for a match."""
    for entry in listed:
        hit = next((module for module in quantized if entry in module), None)
        if hit is not None:
            raise InputError(
                f"{entry} stays unquantized, and engines would take its name on the list of excluded modules "
                f"for {hit} too, which the recipe quantizes; choose a recipe that treats both alike"
            )
