"""What a run was made from, as content digests, and how two such descriptions differ.

Paths, times and log levels are no part of it. Digests are xxh3_128, written `xxh3:<32 hex digits>`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from state.durable import Bytes
from state.errors import Difference, IdentityMismatch
from state.frozen import Frozen

# Written by the library that saved the config, not part of the model.
IGNORED_CONFIG = frozenset({"transformers_version", "_name_or_path"})


def digest(data: Bytes) -> str:
    """`xxh3:<32 hex digits>` of some bytes."""
    return "xxh3:" + xxhash.xxh3_128_hexdigest(data)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8.

    Raises:
        TypeError, ValueError: the value has no JSON text.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_json(value: Any) -> str:
    """Digest of the canonical JSON text of a value."""
    return digest(canonical_json(value))


def tensor_digest(dtype: str, shape: Sequence[int], data: Bytes) -> str:
    """`BF16[4096,256] xxh3:...`: safetensors' name of the dtype, the shape and the digest of the bytes."""
    return described(dtype, shape, digest(data))


def described(dtype: str, shape: Sequence[int], digested: str) -> str:
    """As `tensor_digest`, of bytes that were digested already."""
    return f"{dtype}[{','.join(map(str, shape))}] {digested}"


class Digesting:
    """`digest` of bytes that come in parts."""

    def __init__(self) -> None:
        self._parts = xxhash.xxh3_128()

    def update(self, data: Bytes) -> None:
        """Add the bytes that follow."""
        self._parts.update(data)

    def __str__(self) -> str:
        return f"xxh3:{self._parts.hexdigest()}"


def tokens_digest(tokens: NDArray[np.int32]) -> str:
    """`tensor_digest` of the int32 token matrix [windows, seq]."""
    return tensor_digest("I32", tokens.shape, np.ascontiguousarray(tokens, dtype="<i4").tobytes())


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """A nested config as {`rope_parameters.rope_theta`: JSON text of the value}.

    `IGNORED_CONFIG` is left out at any depth. List items are named `layer_types[3]`; empty lists and objects
    are values. A dot, bracket or backslash within a key is escaped by a backslash, so that different configs
    never flatten to the same result.
    """
    return {name.removeprefix("."): value for name, value in sorted(_leaves("", config)) if name}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        items = [
            (f"{name}.{_escaped(key)}", item) for key, item in value.items() if key not in IGNORED_CONFIG
        ]
    elif isinstance(value, list | tuple):
        items = [(f"{name}[{position}]", item) for position, item in enumerate(value)]
    else:
        yield name, canonical_json(value).decode()
        return
    if not items:
        yield name, "{}" if isinstance(value, Mapping) else "[]"
    for item_name, item in items:
        yield from _leaves(item_name, item)


def _escaped(key: str) -> str:
    return "".join("\\" + char if char in ".[\\" else char for char in key)


class Identity(Frozen):
    """Content of everything that calibration's result depends on.

    Attributes:
        tensors: hub name -> `tensor_digest`. By tensor, so that resharding does not matter.
        config: the model's config, flattened.
        tokenizer: name of each tokenizer file -> digest.
        tokens: `tokens_digest` of the token matrix.
        statistics: names of the statistics collected, sorted.
        code: name of each file of Python code that came with the model and was run -> digest. Not written
            where there is none, so that such an identity has the bytes it always had.
    """

    tensors: dict[str, str]
    config: dict[str, str]
    tokenizer: dict[str, str]
    tokens: str
    statistics: tuple[str, ...]
    code: dict[str, str] = Field(default_factory=dict, exclude_if=lambda code: not code)

    @property
    def tensors_digest(self) -> str:
        """Digest of the sorted list of tensors."""
        return digest_json(sorted(self.tensors.items()))

    @property
    def digest(self) -> str:
        """Digest of the whole identity."""
        return digest_json(self.model_dump(mode="json"))


class Environment(Frozen):
    """What a forward pass's bits depend on besides its inputs; compared when an unfinished run resumes.

    cpu: the instruction sets that kernels are chosen by. libraries: those that round, beside torch. Either is
    empty, and not written, where an older Holdfast recorded none.
    """

    torch: str
    transformers: str
    modelopt: str
    device: str
    experts: str
    dtype: str
    batch: int
    threads: int
    cpu: str = Field(default="", exclude_if=lambda cpu: not cpu)
    libraries: str = Field(default="", exclude_if=lambda libraries: not libraries)


def differences(stored: Identity | Environment, current: Identity | Environment) -> list[Difference]:
    """Every field that differs, by names such as `config.rope_parameters.rope_theta`. What a stored
    environment does not say is not compared: see `unrecorded`.
    """
    a, b = _fields(stored), _fields(current)
    unknown = unrecorded(stored, current) if isinstance(stored, Environment) else ()
    return [
        Difference(field, a.get(field), b.get(field))
        for field in (a | b)
        if a.get(field) != b.get(field) and field not in unknown
    ]


def unrecorded(stored: Environment, current: Environment | Identity) -> tuple[str, ...]:
    """Fields of an environment that an older Holdfast did not record."""
    return tuple(sorted(_fields(current).keys() - _fields(stored).keys()))


def _fields(description: Identity | Environment) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in description.model_dump(mode="json").items():
        if isinstance(value, dict):
            fields |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            fields[name] = ", ".join(value) if isinstance(value, list) else str(value)
    return fields


def require_same(
    stored: Identity | Environment, current: Identity | Environment, what: str, remedy: str
) -> None:
    """Refuse to go on with other content than what is stored.

    Args:
        what: opening of the message, such as `runs/a was made from other content`.
        remedy: the next command to type.

    Raises:
        IdentityMismatch: names every differing field with both values.
    """
    found = differences(stored, current)
    if found:
        lines = [
            f"{what}; {len(found)} field(s) differ:",
            *(f"  {difference}" for difference in found),
            remedy,
        ]
        raise IdentityMismatch("\n".join(lines), found)
