"""What the two configurations of a checkpoint say of its quantization, in one form.

`config.json` holds `quantization_config`, which vLLM reads; `hf_quant_config.json` holds `quantization`,
which TensorRT-LLM puts above it. Both must say the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.engines.algos import ALGOS, MIXED
from stages.engines.exclusion import asked

KV_BITS = {8: "FP8", 4: "NVFP4"}


@dataclass(frozen=True)
class LayerAlgo:
    """What a mixed checkpoint says of one layer."""

    algo: str
    group_size: int | None = None


@dataclass(frozen=True)
class Stated:
    """One configuration.

    algo: `quant_algo` in capitals, None where weights are plain. layers: of MIXED_PRECISION, module → what it
    is. kv: the format of KV caches, in capitals. ignored: modules and patterns that stay unquantized.
    """

    algo: str | None
    group_size: int | None
    ignored: tuple[str, ...]
    kv: str | None
    layers: Mapping[str, LayerAlgo] = field(default_factory=dict)

    def algo_of(self, module: str) -> str | None:
        """The format that a quantized module is said to be in: its own entry's, or that of its experts or of
        the nearest module above it, where the checkpoint is mixed. None where nothing is said.
        """
        if self.algo != MIXED:
            return self.algo
        return next((self.layers[name].algo for name in _upwards(module) if name in self.layers), None)

    def group_of(self, module: str) -> int | None:
        """The group size that is said of a module."""
        if self.algo != MIXED:
            return self.group_size
        return next((self.layers[name].group_size for name in _upwards(module) if name in self.layers), None)

    @property
    def mixed(self) -> bool:
        """Whether each layer has a format of its own."""
        return self.algo == MIXED


def inline(content: Mapping[str, Any]) -> Stated:
    """`quantization_config` of config.json."""
    scheme = content.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        bits = scheme.get("num_bits")
        known = KV_BITS.get(bits) if type(bits) is int and scheme.get("type") == "float" else None
        scheme = known or str(dict(scheme))
    mixed = _upper(content.get("quant_algo")) == MIXED
    return Stated(
        _upper(content.get("quant_algo")),
        _group_size(content.get("group_size"))
        or (None if mixed else _of_groups(content.get("config_groups"))),
        _names(content.get("ignore")),
        _upper(scheme),
        _layers(content.get("quantized_layers")),
    )


def separate(content: Mapping[str, Any]) -> Stated:
    """`quantization` of hf_quant_config.json."""
    return Stated(
        _upper(content.get("quant_algo")),
        _group_size(content.get("group_size")),
        _names(content.get("exclude_modules")),
        _upper(content.get("kv_cache_quant_algo")),
        _layers(content.get("quantized_layers")),
    )


def differences(one: Stated, other: Stated) -> list[str]:
    """What the two configurations disagree about, for people. A group size that one leaves out is that of
    the format.
    """
    found = []
    if one.algo != other.algo:
        found.append(f"quant_algo: {one.algo} and {other.algo}")
    own = ALGOS[one.algo].group_size if one.algo in ALGOS else None
    if (one.group_size or own) != (other.group_size or own):
        found.append(f"group_size: {one.group_size} and {other.group_size}")
    if one.kv != other.kv:
        found.append(f"KV cache: {one.kv} and {other.kv}")
    for name in sorted(set(one.ignored) ^ set(other.ignored)):
        where = "config.json" if name in one.ignored else "hf_quant_config.json"
        found.append(f"{name} is left unquantized by {where} alone")
    for name in sorted(one.layers.keys() | other.layers.keys()):
        if one.layers.get(name) != other.layers.get(name):
            found.append(f"quantized_layers: {name} is not the same")
    return found


def group_faults(content: Mapping[str, Any], stated: Stated) -> list[str]:
    """What `config_groups` says otherwise than the rest of `quantization_config`, for people."""
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping):
        return ["a mixed checkpoint needs config_groups"] if stated.mixed else []
    found, targets = [], set()
    for name, group in groups.items():
        weights, listed = _part(group, "weights"), _names(_part(group, "targets"))
        named = [target for target in listed if target in stated.layers]
        targets.update(named)
        algos = {stated.layers[target].algo for target in named} if stated.mixed else {stated.algo}
        for algo in sorted(algo for algo in algos if algo in ALGOS):
            bits = 4 if ALGOS[algo].codes.rows * ALGOS[algo].codes.columns == 2 else 8
            if isinstance(weights, Mapping) and weights.get("num_bits") != bits:
                found.append(f"{name} has weights of {weights.get('num_bits')} bits, {algo} has {bits}")
    if stated.mixed and (missing := sorted(stated.layers.keys() - targets)):
        found.append(f"{missing[0]} is in no group ({len(missing)} such)")
    return found


def _upwards(module: str) -> list[str]:
    names = [module]
    while "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return [names[0], asked(module), *names[1:]]


def _upper(value: Any) -> str | None:
    return None if value is None else str(value).upper()


def _group_size(value: Any) -> int | None:
    return value if type(value) is int else None


def _of_groups(groups: Any) -> int | None:
    """The group size that the only group of `config_groups` says of its weights."""
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    return _group_size(_part(_part(next(iter(groups.values())), "weights"), "group_size"))


def _part(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def _names(value: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in value) if isinstance(value, list) else ()


def _layers(value: Any) -> dict[str, LayerAlgo]:
    if not isinstance(value, Mapping):
        return {}
    return {
        str(name): LayerAlgo(str(entry.get("quant_algo")).upper(), _group_size(entry.get("group_size")))
        for name, entry in value.items()
        if isinstance(entry, Mapping)
    }
