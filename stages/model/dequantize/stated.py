"""What a configuration says of how its checkpoint is quantized. Nothing here looks at tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from state.errors import InputError

METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")
"""Of `quantization_config.quant_method`: those whose schemes can be read."""

KEY = "quantization_config"


@dataclass(frozen=True)
class Grain:
    """What a scale spans: rows and columns; None stands for all of them."""

    rows: int | None
    columns: int | None


@dataclass(frozen=True)
class Stated:
    """One `quantization_config`.

    fp8: what scales of FP8 weights span; int4: of INT4 weights; empty where nothing is said. unconverted:
    modules that are said to be left alone, or patterns.
    """

    method: str
    fp8: frozenset[Grain] = frozenset()
    int4: frozenset[Grain] = frozenset()
    unconverted: tuple[str, ...] = ()

    def leaves_alone(self, module: str) -> bool:
        """Whether a module is named as unquantized, itself or by a pattern for names as a whole."""
        return any(fnmatchcase(module, pattern) for pattern in self.unconverted)


def stated_quantization(config: Mapping[str, Any], where: str) -> Stated | None:
    """What config.json says, of the whole model or of its text model; None where it says nothing.

    where: the file, for messages.
    Raises InputError for a method that can't be read.
    """
    content = next((found for found in _configs(config)), None)
    if content is None:
        return None
    method = str(content.get("quant_method"))
    if method not in METHODS:
        raise _unreadable(where, f"quant_method {method!r}")
    left = content.get("modules_to_not_convert") or content.get("ignore") or ()
    unconverted = tuple(name for name in left if isinstance(name, str))
    if method == "compressed-tensors":
        fp8, int4 = _compressed(content, where)
        return Stated(method, fp8, int4, unconverted)
    block = content.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int for size in block)):
        return Stated(method, unconverted=unconverted)
    return Stated(method, frozenset({Grain(*block)}), unconverted=unconverted)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the same model, unquantized."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != KEY
    }


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every `quantization_config`, that of the whole model first."""
    if isinstance(found := config.get(KEY), Mapping) and found:
        yield found
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _configs(value)


def _compressed(content: Mapping[str, Any], where: str) -> tuple[frozenset[Grain], frozenset[Grain]]:
    """What scales span by the groups of compressed-tensors."""
    if content.get("transform_config"):
        raise _unreadable(where, "transform_config (rotated weights)")
    sparsity = content.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _unreadable(where, f"sparsity_config.format {sparsity['format']!r}")
    found: dict[str, set[Grain]] = {"float": set(), "int": set()}
    for name, group in (content.get("config_groups") or {}).items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        kind, bits = str(weights.get("type")), weights.get("num_bits")
        if (kind, bits) not in (("float", 8), ("int", 4)) or not weights.get("symmetric", True):
            raise _unreadable(where, f"config_groups.{name}.weights: {kind}{bits}, or not symmetric,")
        found[kind].add(_grain(weights, where))
    return frozenset(found["float"]), frozenset(found["int"])


def _grain(weights: Mapping[str, Any], where: str) -> Grain:
    strategy = weights.get("strategy")
    if strategy == "tensor":
        return Grain(None, None)
    if strategy == "channel":
        return Grain(1, None)
    size, block = weights.get("group_size"), weights.get("block_structure")
    if strategy == "group" and type(size) is int:
        return Grain(1, size)
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        return Grain(*block)
    raise _unreadable(where, f"strategy {strategy!r}")


def _unreadable(where: str, what: str) -> InputError:
    return InputError(
        f"{where} says that the checkpoint is already quantized, with {KEY}: {what} can't be read here; give "
        "the unquantized model it was made from as MODEL"
    )
