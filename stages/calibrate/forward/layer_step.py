"""What a layerwise forward yields behind each layer."""

from dataclasses import dataclass

from torch import nn

from stages.calibrate.forward.hidden import HiddenStates
from stages.calibrate.forward.rehearsal import Rehearsal
from stages.calibrate.forward.replay import Replay


@dataclass(frozen=True)
class LayerStep:
    """A decoder layer that all batches have gone through; its weights stay until the next step is taken.

    rehearsal: how copies of it are called, where that was asked for.
    replay: the second stream, where there is one.
    """

    layer: int
    name: str
    module: nn.Module
    states: HiddenStates
    rehearsal: Rehearsal | None
    replay: Replay | None = None

    def seal(self) -> None:
        """Keep what is behind this layer for the next process to go on from: see `HiddenStates.seal`."""
        if self.replay is not None:
            self.replay.second.seal()
        self.states.seal()
