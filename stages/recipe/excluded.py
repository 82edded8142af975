"""The list of modules that engines must leave alone, completed.

modelopt lists the linears that its quantizers pass over. A checkpoint may hold more matrices that stay as
they are: those of MTP layers and others that the model class never builds. An engine that builds such a
module without finding it on the list expects it quantized, and refuses it or reads BF16 as codes.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from stages.engines.exclusion import asked, caught, matrix_of
from state.errors import InputError
from state.source import TensorEntry


def with_all_excluded(
    hf_quant_config: dict[str, Any],
    tensors: Mapping[str, TensorEntry],
    quantized: Mapping[str, str],
    embeddings: Collection[str],
    experts: Mapping[str, str],
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """modelopt's quantization config with every unquantized matrix of the checkpoint on its list.

    Args:
        quantized: module that is quantized → the hub tensor that holds its weight.
        embeddings: hub tensors of embeddings, which engines read as they are.
        experts: hub tensor that holds a projection of all experts → the experts' module.
        left_out: modules that modelopt's table of layers would call quantized, and which are not.
    Raises InputError where an entry would also name a quantized module to an engine.
    """
    quantization = dict(hf_quant_config.get("quantization", {}))
    if "quantized_layers" in quantization:
        layers = quantization["quantized_layers"]
        quantization["quantized_layers"] = {name: layers[name] for name in layers if name not in left_out}
    if "exclude_modules" in quantization and quantized:
        modules = _unquantized(tensors, set(quantized.values()), embeddings, experts)
        # modelopt lists embeddings itself, but for those that the recipe quantizes.
        modules += [name for name in left_out if f"{name}.weight" in embeddings]
        listed = list(quantization["exclude_modules"])
        # Engines ask for all experts of a layer at once, under the name of what holds them.
        for module in dict.fromkeys([*modules, *map(asked, modules)]):
            if not any(fnmatchcase(module, pattern) for pattern in listed):
                listed.append(module)
        listed += [name for name in map(_name_in_vllm, modules) if name is not None and name not in listed]
        _refuse_ambiguous(listed, quantized)
        quantization["exclude_modules"] = listed
    return hf_quant_config | {"quantization": quantization}


def _unquantized(
    tensors: Mapping[str, TensorEntry],
    stored: Collection[str],
    embeddings: Collection[str],
    experts: Mapping[str, str],
) -> list[str]:
    """The modules of all matrices that stay as they are, each once."""
    plain = [entry for name, entry in tensors.items() if name not in stored and name not in embeddings]
    found = (experts.get(entry.name) or matrix_of(entry.name, entry.shape) for entry in plain)
    return list(dict.fromkeys(module for module in found if module is not None))


def _name_in_vllm(module: str) -> str | None:
    """What vLLM calls experts that lie directly in a decoder layer on the hub (Gemma 4); None for others."""
    parent, _, leaf = module.rpartition(".")
    number = parent.rpartition(".")[2]
    return f"*layers.{number}.moe.experts*" if leaf == "experts" and number.isdigit() else None


def _refuse_ambiguous(listed: Sequence[str], quantized: Iterable[str]) -> None:
    for hit, entry in caught("vllm", quantized, listed).items():
        raise InputError(
            f"{entry} stays unquantized, and engines would take its name on the list of excluded modules "
            f"for {hit} too, which the recipe quantizes; choose a recipe that treats both alike"
        )
