"""Ways to spoil a model folder or a data file; the same seed of the generator does the same damage."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**6, 10**9, 10**30, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "..", "../../etc/passwd", "/dev/zero", "\x00", "\x1b[2J", "\ud800",
    "a" * 5000, "${HOME}", "__import__('os')",
    [], {}, [[]], [None], [1, 2, 3], {"": 1}, {"x": {"y": []}}, ["full_attention"] * 3,
)  # fmt: skip

Mutation = Callable[[Path, random.Random], str]


def spoil_bytes(path: Path, chance: random.Random) -> str:
    """Flips, cuts, repeats or fills some bytes."""
    data = bytearray(path.read_bytes())
    way = chance.choice(("flip", "flip", "flip", "cut", "drop", "repeat", "zero", "empty", "insert"))
    at = chance.randrange(max(1, min(len(data), chance.choice((64, 4096, len(data) or 1)))))
    length = chance.choice((1, 4, 64, 1024))
    if way == "flip":
        for _ in range(chance.choice((1, 1, 8))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "drop":
        del data[at : at + length]
    elif way == "repeat":
        data[at:at] = data[at : at + length]
    elif way == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif way == "empty":
        data.clear()
    else:
        data[at:at] = chance.randbytes(length)
    path.write_bytes(data)
    return f"{path.name}: {way} at {at}, {length}"


def spoil_json(path: Path, chance: random.Random) -> str:
    """Puts something nasty in place of one value, or takes one away, anywhere in a JSON file."""
    content = json.loads(path.read_text())
    said = _spoil_value(content, chance)
    path.write_text(json.dumps(content))
    return f"{path.name}: {said}"


def spoil_header(path: Path, chance: random.Random) -> str:
    """Spoils the JSON header of a safetensors file and keeps its length true."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.3:
        name = chance.choice(list(header))
        other = chance.choice(
            ("", ".", "a/b", "..", "a\nb", "\x1b[2J", "x" * 10_000, "model..weight", "\ud800")
        )
        header[other] = header.pop(name)
        said = f"{name} becomes {other[:20]!r}"
    else:
        said = _spoil_value(header, chance)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"{path.name}: {said}"


def spoil_lines(path: Path, chance: random.Random) -> str:
    """Spoils one record of a JSONL file."""
    lines = path.read_text().splitlines()
    at = chance.randrange(min(3, len(lines)))
    record = chance.choice(
        (
            {"text": chance.choice(NASTY)},
            {"messages": chance.choice(NASTY)},
            {"messages": [{"role": chance.choice(NASTY), "content": chance.choice(NASTY)}]},
            {"conversations": [{"from": chance.choice(NASTY), "value": chance.choice(NASTY)}]},
            chance.choice(NASTY),
        )
    )
    lines[at] = json.dumps(record)
    path.write_text("\n".join(lines))
    return f"{path.name}: line {at} is {lines[at][:80]}"


def _spoil_value(content: Any, chance: random.Random) -> str:
    places = list(_places(content, ""))
    holder, key, name = chance.choice(places)
    if chance.random() < 0.15:
        del holder[key]
        return f"{name} is gone"
    holder[key] = chance.choice(NASTY)
    return f"{name} = {str(holder[key])[:40]!r}"


def _places(content: Any, name: str) -> Iterator[tuple[Any, Any, str]]:
    if isinstance(content, dict):
        for key in list(content):
            yield content, key, f"{name}.{key}"
            yield from _places(content[key], f"{name}.{key}")
    elif isinstance(content, list):
        for position in range(min(len(content), 20)):
            yield content, position, f"{name}[{position}]"
            yield from _places(content[position], f"{name}[{position}]")
