"""Room for one boundary: the state of every batch between two decoder layers, in memory or in a file."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from stages.model.raw import raw_bytes
from state.durable import DEVICE_ERRORS, WRITE_ERRORS, Disk
from state.errors import DamagedStore, OutOfSpace, WriteFailed
from state.identity import digest

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
    a buffer in memory is read once per batch, and what is read or peeked at is the caller's own."""

    def write(self, batch: int, state: State) -> None: ...
    def read(self, batch: int) -> State: ...
    def peek(self, batch: int) -> State: ...
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

    def peek(self, batch: int) -> State:
        """A copy of a batch's state on the compute device; it stays here too."""
        return {
            name: value.to(self._device, non_blocking=True, copy=True)
            for name, value in self._states[batch].items()
        }

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
    """Where a tensor lies in a file of hidden states, and the digest of its bytes."""

    start: int
    dtype: str
    shape: tuple[int, ...]
    digest: str


Blocks = dict[int, dict[str, Block]]
"""What a file of hidden states holds: batch → name → block."""


class FileBuffer:
    """A boundary in a file of raw tensors, each of which is compared with its digest when it is read.

    Written and read with plain calls, not through a mapping: a full disk is then an error and not a SIGBUS.

    Args:
        blocks: what an earlier process wrote to the file; without them it is begun anew.

    Raises:
        OutOfSpace: the file can't grow, or the device reports an error.
        DamagedStore: the file does not hold what was written.
    """

    def __init__(self, path: Path, device: torch.device, blocks: Blocks | None = None) -> None:
        # Not the run's own folder: one that was moved is not begun anew.
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(exist_ok=True)
        self.path = path
        self._device = device
        self.blocks = dict(blocks or {})
        if blocks is None:  # never written through: what has this name may be a link
            path.unlink(missing_ok=True)
        self._file = path.open("x+b" if blocks is None else "rb", buffering=0)
        self._end = 0

    def write(self, batch: int, state: State) -> None:
        """Append a batch's state."""
        placed = {}
        for name, value in state.items():
            data = raw_bytes(value.cpu())
            dtype = str(value.dtype).removeprefix("torch.")
            placed[name] = Block(self._end, dtype, tuple(value.shape), digest(data))
            self._append(data)
        self.blocks[batch] = placed

    def _append(self, data: memoryview) -> None:
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, self._end)
                self._end += written
                data = data[written:]
        except OSError as error:
            if error.errno in DEVICE_ERRORS:
                free = shutil.disk_usage(self.path.parent).free
                raise OutOfSpace(self.path, data.nbytes, free, DEVICE_ERRORS[error.errno]) from error
            if error.errno in WRITE_ERRORS:
                raise WriteFailed(self.path, os.strerror(error.errno)) from error
            raise

    def read(self, batch: int) -> State:
        """A batch's state on the compute device."""
        return {name: self._read(block).to(self._device) for name, block in self.blocks[batch].items()}

    peek = read

    def _read(self, block: Block) -> torch.Tensor:
        value = torch.empty(block.shape, dtype=getattr(torch, block.dtype))
        view = raw_bytes(value)
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], block.start + done)
            if count == 0:
                raise self._damaged("ends inside a tensor")
            done += count
        if digest(view) != block.digest:
            raise self._damaged(f"holds other bytes at {block.start:,} than were written")
        return value

    def _damaged(self, fault: str) -> DamagedStore:
        return DamagedStore(
            f"{self.path} {fault}. Nothing of it was committed; give the same command again, which makes the "
            "hidden states anew",
            [str(self.path)],
        )

    def seal(self) -> None:
        """Make the file durable."""
        os.fsync(self._file.fileno())
        Disk().sync([self.path.parent])

    def close(self) -> None:
        """Close the file and leave it."""
        self._file.close()

    def drop(self) -> None:
        """Close and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def open_buffer(path: Path, device: torch.device, needed: int, limits: Limits) -> Buffer:
    """Room for `needed` bytes in the first place whose limit they fit."""
    if needed <= limits.device and device.type != "cpu":
        return MemoryBuffer(device, on_device=True)
    if needed <= limits.host:
        return MemoryBuffer(device, on_device=False)
    return FileBuffer(path, device)
