"""The state of every batch at a boundary between two decoder layers: hidden states, and what a family carries
beside them.

Layer k reads boundary k and writes boundary k + 1. A boundary lives on the compute device, in host memory, or
in a file, whichever limit it still fits. In memory each batch is let go as it is read. In a file boundary k
stays whole until layer k is committed, so that a process which is killed costs no more than that layer.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from stages.calibrate.forward.buffers import Buffer, FileBuffer, Limits, State, open_buffer
from stages.calibrate.forward.kept import Boundary, BrokenRecord, Circumstances, read_boundary
from state.errors import DamagedStore

HIDDEN_FOLDER, SECOND_FOLDER, ARGUMENTS_FOLDER = "hidden", "hidden-quantized", "arguments"
"""In the folder of a layer-by-layer pass: boundaries of both streams, and arguments that differ from batch to
batch.
"""

OURS = re.compile(r"(before-)?\d{6}\.(raw|json)(\.tmp)?")
"""Names of the files that are made here; older versions kept records beside the folder as `before-N.json`."""


class HiddenStates:
    """The boundaries before and after the layer that is being computed.

    Args:
        folder: for boundary files and their records, used by this object alone: others found there are
            deleted.
        batches: how many there are. device: where `read` puts them. limits: see `Limits`.
        circumstances: kept with a boundary file, which is gone on from only under the same.
        say: told why hidden states that an earlier process left can't be used.
    """

    def __init__(
        self,
        folder: Path,
        batches: int,
        device: torch.device,
        limits: Limits,
        circumstances: Circumstances,
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._batches = batches
        self._device = device
        self._limits = limits
        self._circumstances = circumstances
        self._say = say
        self._uncommitted: FileBuffer | None = None
        self._before: Buffer | None = None
        self._after: Buffer | None = None
        self.layer = 0

    def restore(self, layer: int) -> int:
        """Go on from the last whole boundary at or before a layer, as an earlier process left it, and delete
        the others. Returns the layer that it is before; 0, whose inputs are not kept here, where there is
        none.
        """
        self.find(layer)
        self.settle()
        return self.layer

    def find(self, layer: int) -> int:
        """`restore` that may be asked for an earlier layer again, until `settle`."""
        self._let_go()
        self.layer, found = 0, False
        for number in self._recorded(layer):
            found = True
            try:
                self._before = self._open(number)
                self.layer = number
                break
            except (BrokenRecord, DamagedStore, OSError) as error:
                self._say(f"the hidden states before layer {number} can't be used: {error}")
        if found and not self.layer:
            self._say("the hidden states are made anew from the first layer on")
        return self.layer

    def settle(self) -> None:
        """Delete all boundaries but the one that is gone on from."""
        self._clean(keep=self.layer)

    def _recorded(self, last: int) -> list[int]:
        """Layers up to `last` before which there is the record of a boundary, from the last one down."""
        names = (re.fullmatch(r"(\d{6})\.json", path.name) for path in self._folder.glob("*.json"))
        return sorted(
            (number for name in names if name and 0 < (number := int(name[1])) <= last), reverse=True
        )

    def _open(self, layer: int) -> FileBuffer:
        boundary = read_boundary(self._record(layer), layer, self._circumstances)
        buffer = FileBuffer(self._path(layer), self._device, boundary.blocks)
        try:
            for batch in boundary.blocks:
                buffer.read(batch)
        except DamagedStore:
            buffer.close()
            raise
        return buffer

    def write(self, batch: int, state: State) -> None:
        """Put a batch's state at the boundary after the current layer."""
        if self._after is None:
            path = self._path(self.layer + 1)
            self._after = open_buffer(path, self._device, self._needed(state), self._limits)
        self._after.write(batch, state)

    def enter(self, batch: int, state: State) -> None:
        """Put a batch's state before the first layer, where that has to be read again."""
        if self._before is None:
            self._before = open_buffer(self._path(0), self._device, self._needed(state), self._limits)
        self._before.write(batch, state)

    def _needed(self, state: State) -> int:
        # A batch is between two boundaries at a time; the first batch is the largest.
        return (self._batches + 1) * sum(value.nbytes for value in state.values())

    def read(self, batch: int) -> State:
        """A batch's state before the current layer, on the device; asked for once, and the caller's own to
        change.

        Raises:
            DamagedStore: it lies in a file and is not what was written.
        """
        if self._before is None:
            raise ValueError("there is no boundary to read yet")
        return self._before.read(batch)

    def peek(self, batch: int) -> State:
        """As `read`, for a batch that is yet to be read."""
        if self._before is None:
            raise ValueError("there is no boundary to read yet")
        return self._before.peek(batch)

    def peek_behind(self, batch: int) -> State:
        """A copy of a batch's state behind the current layer."""
        assert self._after is not None
        return self._after.peek(batch)

    def seal(self) -> None:
        """Make the boundary after the current layer durable, with its record, before this layer is committed.
        One in memory must be recomputed after a crash.
        """
        if isinstance(self._after, FileBuffer):
            self._after.seal()
            boundary = Boundary(self.layer + 1, self._circumstances, self._after.blocks)
            boundary.publish(self._record(self.layer + 1))

    def turn(self) -> None:
        """Go to the next layer: what was written is read from now on. What was read before is let go in
        memory; in a file only at the next turn, before which the commit of this layer ends.
        """
        self._drop_uncommitted()
        if isinstance(self._before, FileBuffer):
            self._uncommitted = self._before
        elif self._before is not None:
            self._before.drop()
        self._before, self._after = self._after, None
        self.layer += 1

    def close(self) -> None:
        """Let go of all boundaries and their files, once the last layer is committed."""
        for buffer in (self._uncommitted, self._before, self._after):
            if buffer is not None:
                buffer.drop()
        self._uncommitted = self._before = self._after = None
        self._clean(keep=0)

    def _let_go(self) -> None:
        """Close what an earlier `find` opened."""
        if isinstance(self._before, FileBuffer):
            self._before.close()
        self._before = None

    def _drop_uncommitted(self) -> None:
        if self._uncommitted is not None:
            # The record first: without its file it would be damage.
            self._uncommitted.path.with_suffix(".json").unlink(missing_ok=True)
            self._uncommitted.drop()
            self._uncommitted = None

    def _path(self, layer: int) -> Path:
        return self._folder / f"{layer:06d}.raw"

    def _record(self, layer: int) -> Path:
        return self._path(layer).with_suffix(".json")

    def _clean(self, keep: int) -> None:
        kept = (self._path(keep), self._record(keep)) if keep else ()
        for path in self._folder.glob("*"):
            if OURS.fullmatch(path.name) and path not in kept:
                path.unlink(missing_ok=True)


def discard(folder: Path) -> list[Path]:
    """Delete what layer-by-layer passes left in a run's folder for it, and that folder once it is empty.
    Returns what else is in it, which stays.
    """
    left: list[Path] = []
    places = [folder / name for name in (HIDDEN_FOLDER, SECOND_FOLDER, ARGUMENTS_FOLDER)]
    for place in (*places, folder):
        if not place.is_dir():
            continue
        for path in place.iterdir():
            if OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink()
        rest = sorted(place.iterdir())
        left += [path for path in rest if path not in places]
        if not rest and not place.is_symlink():
            place.rmdir()
    return left
