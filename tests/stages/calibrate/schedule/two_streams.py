"""Runs of GPTQ whose second stream is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from stages.calibrate.forward.buffers import HIDDEN
from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.observe.second_moments import Moments
from stages.calibrate.schedule.quantized_stream import QuantizedStream


@dataclass
class Looked:
    """What was seen of a run, by layer.

    first, second: the hidden states behind it, batch by batch. moments: what its solver was given: array key
    → H.
    """

    first: dict[int, list[Tensor]] = field(default_factory=dict)
    second: dict[int, list[Tensor]] = field(default_factory=dict)
    moments: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@contextmanager
def looking() -> Iterator[Looked]:
    """Within the context calibrations tell of their second stream."""
    looked = Looked()
    advance, collect = QuantizedStream.advance, QuantizedStream.collect

    def advanced(self: QuantizedStream, step: LayerStep, solution: dict[str, Tensor]) -> None:
        advance(self, step, solution)
        replay = step.replay
        assert replay is not None
        looked.first[step.layer] = [replay.target(batch) for batch in range(replay.batches)]
        looked.second[step.layer] = [
            replay.second.peek_behind(batch)[HIDDEN] for batch in range(replay.batches)
        ]

    def collected(self: QuantizedStream, step: LayerStep, moments: Moments) -> None:
        collect(self, step, moments)
        looked.moments[step.layer] = {key: total.clone() for key, total in moments.sums.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedStream, "advance", advanced)
        patch.setattr(QuantizedStream, "collect", collected)
        yield looked
