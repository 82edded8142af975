"""The state of every batch at a boundary between two decoder layers: hidden states, and what a family carries
beside them.

Layer k reads boundary k and writes boundary k + 1. A boundary lives on the compute device, in host memory, or
in a file, whichever limit it still fits. In memory each batch is let go as it is read; in a file boundary k
stays whole until layer k is committed.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from state.durable import DEVICE_ERRORS, Disk
from state.errors import OutOfSpace

State = dict[str, torch.Tensor]
"""One batch at one boundary, by name; `HIDDEN` is the hidden state."""

HIDDEN = "hidden"


@dataclass(frozen=True)
class Limits:
    """Bytes that boundaries may take on the compute device, and in host memory when they don't fit there;
    beyond that they go to files."""

    device: int
    host: int


class Buffer(Protocol):
    """Room for one boundary. Each batch is written once, and what is written is the buffer's from then on;
    a buffer in memory is read once per batch, and what is read is the caller's own."""

    def write(self, batch: int, state: State) -> None: ...
    def read(self, batch: int) -> State: ...
    def drop(self) -> None: ...


class MemoryBuffer:
    """A boundary in memory: on the compute device, or on the host (pinned for a GPU)."""

    def __init__(self, device: torch.device, on_device: bool) -> None:
        self._device = device
        self._elsewhere = device.type == "cuda" and not on_device
        self._states: dict[int, State] = {}

    def write(self, batch: int, state: State) -> None:
        """Keep a batch's state; on a GPU copies are queued on the current stream, as reads are."""
        hold = _to_pinned if self._elsewhere else _alone
        self._states[batch] = {name: hold(value) for name, value in state.items()}

    def read(self, batch: int) -> State:
        """A batch's state on the compute device, let go here."""
        state = self._states.pop(batch)
        return {name: value.to(self._device, non_blocking=True) for name, value in state.items()}

    def drop(self) -> None:
        """Let go of everything."""
        self._states.clear()


def _to_pinned(value: torch.Tensor) -> torch.Tensor:
    held = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return held.copy_(value, non_blocking=True)


def _alone(value: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it is a view that would keep more than its own memory."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


@dataclass(frozen=True)
class Block:
    """Where a tensor lies in a boundary file."""

    start: int
    dtype: str
    shape: tuple[int, ...]


class FileBuffer:
    """A boundary in a file of raw tensors.

    Written and read with plain calls, not through a mapping: a full disk is then an error and not a SIGBUS.

    Raises:
        OutOfSpace: the file can't grow, or the device reports an error.
    """

    def __init__(
        self, path: Path, device: torch.device, blocks: dict[int, dict[str, Block]] | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._device = device
        self.blocks = dict(blocks or {})
        self._file = path.open("r+b" if blocks else "w+b", buffering=0)
        self._end = path.stat().st_size
        self._digest = xxhash.xxh3_128()

    def write(self, batch: int, state: State) -> None:
        """Append a batch's state."""
        placed = {}
        for name, value in state.items():
            placed[name] = Block(self._end, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            self._append(_bytes_of(value.contiguous().cpu()))
        self.blocks[batch] = placed

    def _append(self, data: memoryview) -> None:
        self._digest.update(data)
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, self._end)
                self._end += written
                data = data[written:]
        except OSError as error:
            if error.errno in DEVICE_ERRORS:
                free = shutil.disk_usage(self.path.parent).free
                raise OutOfSpace(self.path, data.nbytes, free, DEVICE_ERRORS[error.errno]) from error
            raise

    def read(self, batch: int) -> State:
        """A batch's state on the compute device."""
        return {name: self._read(block).to(self._device) for name, block in self.blocks[batch].items()}

    def _read(self, block: Block) -> torch.Tensor:
        value = torch.empty(block.shape, dtype=getattr(torch, block.dtype))
        view = _bytes_of(value)
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], block.start + done)
            if count == 0:
                raise OSError(f"{self.path} ends inside a tensor")
            done += count
        return value

    def seal(self) -> str:
        """Make the file durable; the digest of its bytes."""
        os.fsync(self._file.fileno())
        Disk().sync([self.path.parent])
        return self._digest.hexdigest()

    def drop(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def open_buffer(path: Path, device: torch.device, needed: int, limits: Limits) -> Buffer:
    """Room for `needed` bytes in the first place whose limit they fit."""
    if needed <= limits.device and device.type != "cpu":
        return MemoryBuffer(device, on_device=True)
    if needed <= limits.host:
        return MemoryBuffer(device, on_device=False)
    return FileBuffer(path, device)


@dataclass(frozen=True)
class Boundary:
    """What a commit keeps of a boundary file: enough to find and check it. JSON by `to_json`."""

    layer: int
    digest: str
    blocks: dict[int, dict[str, Block]]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Boundary":
        """The inverse of `to_json`, after a round through JSON too."""
        blocks = {
            int(batch): {
                name: Block(block["start"], block["dtype"], tuple(block["shape"]))
                for name, block in state.items()
            }
            for batch, state in value["blocks"].items()
        }
        return cls(value["layer"], value["digest"], blocks)


class HiddenStates:
    """The boundaries before and after the layer that is being computed.

    Args:
        folder: for boundary files, used by this object alone: others found there are deleted.
        batches: how many there are. device: where `read` puts them. limits: see `Limits`.
    """

    def __init__(self, folder: Path, batches: int, device: torch.device, limits: Limits) -> None:
        self._folder = folder
        self._batches = batches
        self._device = device
        self._limits = limits
        self._before: Buffer | None = None
        self._after: Buffer | None = None
        self.layer = 0

    def restore(self, boundary: Boundary) -> bool:
        """Go on from a boundary file if it is there and whole; False, and nothing has changed, otherwise."""
        path = self._path(boundary.layer)
        if not path.is_file() or _digest(path) != boundary.digest:
            return False
        self._clean(keep=path)
        self._before = FileBuffer(path, self._device, boundary.blocks)
        self.layer = boundary.layer
        return True

    def begin(self) -> None:
        """Start before layer 0, whose inputs are not kept here."""
        self._clean(keep=None)
        self.layer = 0

    def write(self, batch: int, state: State) -> None:
        """Put a batch's state at the boundary after the current layer."""
        if self._after is None:
            # A batch is between two boundaries at a time; the first batch is the largest.
            needed = (self._batches + 1) * sum(value.nbytes for value in state.values())
            self._after = open_buffer(self._path(self.layer + 1), self._device, needed, self._limits)
        self._after.write(batch, state)

    def read(self, batch: int) -> State:
        """A batch's state before the current layer, on the device; asked for once, and the caller's own to
        change."""
        if self._before is None:
            raise ValueError("there is no boundary to read yet")
        return self._before.read(batch)

    def seal(self) -> Boundary | None:
        """Make the boundary after the current layer durable, so that a commit may name it. None when it is in
        memory, and after a crash must be recomputed."""
        if not isinstance(self._after, FileBuffer):
            return None
        return Boundary(self.layer + 1, self._after.seal(), dict(self._after.blocks))

    def turn(self) -> None:
        """Go to the next layer: what was written is read from now on, and what was read before is let go."""
        if self._before is not None:
            self._before.drop()
        self._before, self._after = self._after, None
        self.layer += 1

    def close(self) -> None:
        """Let go of both boundaries and their files."""
        for buffer in (self._before, self._after):
            if buffer is not None:
                buffer.drop()
        self._before = self._after = None

    def _path(self, layer: int) -> Path:
        return self._folder / f"{layer:06d}.raw"

    def _clean(self, keep: Path | None) -> None:
        for path in self._folder.glob("*.raw"):
            if path != keep:
                path.unlink()


def _bytes_of(value: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return value.reshape(-1).view(torch.uint8).numpy().data


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
