"""Names of sites: where in a model something is measured, and the patterns that such names follow.

A pattern is a module name with `L` for the layer number and `E` for the expert number:
`model.layers.3.mlp.experts.17.up_proj` is layer 3, expert 17 of `model.layers.L.mlp.experts.E.up_proj`.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from state.errors import InputError

Role = Literal["input", "k", "v", "weight"]

NUMBER = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True, order=True)
class Site:
    """A place where something is measured: a module's input, its weight, or K or V of an attention module.

    `module` is a hub name, such as `model.layers.3.mlp.experts.17.up_proj`.
    """

    module: str
    role: Role


@cache
def split_name(module: str) -> tuple[str, int | None, int | None]:
    """Split a name into (pattern, layer, expert).

    The number after a component `experts`, or after one that ends in `_quantizers` (modelopt's per-expert
    lists), is the expert; the first other number is the layer; further numbers stay as they are.

    Raises:
        InputError: a component is literally `L` or `E`, which a pattern could not tell apart.
    """
    layer: int | None = None
    expert: int | None = None
    parts: list[str] = []
    for part in module.split("."):
        previous = parts[-1] if parts else ""
        if part in ("L", "E"):
            raise InputError(
                f"module name {module!r} has a component {part!r}, which patterns use for a number"
            )
        if NUMBER.fullmatch(part):
            if expert is None and (previous == "experts" or previous.endswith("_quantizers")):
                expert, part = int(part), "E"
            elif layer is None:
                layer, part = int(part), "L"
        parts.append(part)
    return ".".join(parts), layer, expert


def join_name(pattern: str, layer: int | None = None, expert: int | None = None) -> str:
    """The name of which `split_name` gives (pattern, layer, expert)."""
    numbers = {"L": layer, "E": expert}
    return ".".join(str(numbers[part]) if part in numbers else part for part in pattern.split("."))


def has_layer(pattern: str) -> bool:
    return "L" in pattern.split(".")


def has_expert(pattern: str) -> bool:
    return "E" in pattern.split(".")


def split_key(key: str) -> tuple[str, Role]:
    """`<pattern>.<role>` -> (pattern, role)."""
    pattern, _, role = key.rpartition(".")
    if role not in ("input", "k", "v", "weight"):
        raise ValueError(f"{key!r} does not end in a role")
    return pattern, role  # type: ignore[return-value]
