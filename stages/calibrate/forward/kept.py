"""The record of a boundary that lies in a file: enough for another process to go on from it, or to know that
it can't.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.calibrate.forward.buffers import Block, Blocks
from state.durable import Disk
from state.identity import canonical_json, digest_json

Circumstances = Mapping[str, str | int]
"""What hidden states were made from and under: identity, windows, batch, dtype, device, versions, by name."""


class BrokenRecord(Exception):
    """The record of a boundary can't be used; says why."""


@dataclass(frozen=True)
class Boundary:
    """The hidden states before a layer, in a file. blocks: where in it."""

    layer: int
    circumstances: Circumstances
    blocks: Blocks

    def publish(self, path: Path) -> None:
        """Write the record, durably."""
        blocks = {
            str(batch): {name: asdict(block) for name, block in state.items()}
            for batch, state in self.blocks.items()
        }
        content = {"layer": self.layer, "circumstances": dict(self.circumstances), "blocks": blocks}
        Disk().publish(path, canonical_json(content | {"digest": digest_json(content)}))


def read_boundary(path: Path, layer: int, circumstances: Circumstances) -> Boundary:
    """The boundary before a layer, from its record.

    Raises:
        BrokenRecord: the record is damaged or missing, or the hidden states were made under other
            circumstances.
    """
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("digest")
        intact = stated == digest_json(content) and content["layer"] == layer
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        intact = False
    if not intact:
        raise BrokenRecord(f"{path} is damaged")
    found = content["circumstances"]
    if differing := sorted(
        name for name in found.keys() | circumstances.keys() if found.get(name) != circumstances.get(name)
    ):
        said = "; ".join(f"{name}: {found.get(name)}, now {circumstances.get(name)}" for name in differing)
        raise BrokenRecord(f"they were made under other circumstances ({said})")
    return Boundary(layer, found, _blocks(content["blocks"]))


def _blocks(stored: dict[str, dict[str, Any]]) -> Blocks:
    return {
        int(batch): {
            name: Block(block["start"], block["dtype"], tuple(block["shape"]), block["digest"])
            for name, block in state.items()
        }
        for batch, state in stored.items()
    }
