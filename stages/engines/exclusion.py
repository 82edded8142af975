"""Which modules an engine leaves unquantized by the list of a checkpoint (`ignore`, `exclude_modules`).

Every engine reads the same list by a rule of its own. A quantized module that a rule catches is built
unquantized, so that its weights do not fit; an unquantized one that no rule catches is built quantized.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache

from stages.engines import Engine

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_positions", "wpe"})
"""What embeddings are called that no class builds, such as those of MTP layers."""

NEVER_QUANTIZED = ("vision_tower", "vision_model", "vit_large_projector")
"""Parts of names that vLLM builds unquantized whatever the list says."""

FUSED_NAMES = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}
"""Member of a fused group → what vLLM calls the whole, beside the members."""

EXPERT = re.compile(r"(.*\bexperts)\.\d+\.[^.]+")
WRAPPER = "language_model."


def excluded(engine: Engine, module: str, listed: Sequence[str]) -> str | None:
    """The entry of the list by which an engine leaves a module unquantized; None where it quantizes it.

    Args:
        module: hub name of a linear, of a layer's experts or of one expert's projection.
    """
    rule, name = RULES[engine], asked(module)
    return next((entry for entry in listed if rule(name, entry)), None)


def caught(engine: Engine, modules: Iterable[str], listed: Sequence[str]) -> dict[str, str]:
    """Of modules, those that an engine leaves unquantized → the entry; of a layer's experts the first one."""
    first = {asked(module): module for module in reversed(list(modules))}
    found = {module: excluded(engine, module, listed) for module in first.values()}
    return {module: entry for module, entry in sorted(found.items()) if entry is not None}


def expected_quantized(engine: Engine, modules: Iterable[str], listed: Sequence[str]) -> list[str]:
    """Of unquantized linears and experts, those that an engine takes for quantized ones; of a layer's
    experts the first one.
    """
    first = {asked(module): module for module in reversed(list(modules))}
    return sorted(
        module
        for module in first.values()
        if not (engine == "vllm" and any(part in module for part in NEVER_QUANTIZED))
        and excluded(engine, module, listed) is None
    )


def matrix_of(tensor: str, shape: Sequence[int]) -> str | None:
    """The module that an engine would ask about for a plain tensor; None for what is no matrix of a linear or
    of experts.
    """
    parent, _, leaf = tensor.rpartition(".")
    if len(shape) == 2 and (leaf == "weight" or leaf.endswith("proj_weight")):
        return None if parent.rpartition(".")[2] in EMBEDDINGS else parent
    if len(shape) == 3 and parent.rpartition(".")[2].endswith("experts"):
        return parent
    return None


def asked(module: str) -> str:
    """The name under which engines ask for a module: those of experts ask for all of a layer at once."""
    expert = EXPERT.fullmatch(module)
    return module if expert is None else expert[1]


def _by_vllm(module: str, entry: str) -> bool:
    """Exactly, then as plain text anywhere in the name, then as a pattern (`is_layer_excluded`); experts also
    where the entry names one of them.
    """
    parent, _, leaf = module.rpartition(".")
    fused = FUSED_NAMES.get(leaf)
    names = (module, f"{parent}.{fused}") if fused is not None else (module,)
    if leaf == "experts" and module in entry:
        return True
    return any(entry in name or fnmatchcase(name, entry) for name in names)


def _by_sglang(module: str, entry: str) -> bool:
    """As a pattern of the whole name, with `*` alone, or of any part between its dots."""
    pattern = _pattern(entry)
    names = (module, module.removeprefix(WRAPPER), *module.split("."))
    return any(pattern.fullmatch(name) is not None for name in names)


def _by_trtllm(module: str, entry: str) -> bool:
    """As a pattern of the whole name (`is_module_excluded_from_quantization`)."""
    return fnmatchcase(module, entry)


@cache
def _pattern(entry: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, entry.split("*"))))


RULES: Mapping[Engine, Callable[[str, str], bool]] = {
    "vllm": _by_vllm,
    "sglang": _by_sglang,
    "trtllm": _by_trtllm,
}
