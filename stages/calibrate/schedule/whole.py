"""The whole-model schedule: the model stays on the device, batches of windows stream through it."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.attach import observed
from stages.calibrate.observe.lm_head import without_logits
from stages.calibrate.schedule.steps import Step, Tick
from stages.model.skeleton import Skeleton
from state.head import Cursor


class WholeModel:
    """One pass for statistics; a step is one batch, and the last one may be smaller.

    Args:
        tokens: int32 [windows, seq]. batch: windows per batch as the cursor counts, which is that of the
        environment the run was begun in. at_once: windows per forward; what the batch is now.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        model: PreTrainedModel,
        statistics: Accumulators,
        tokens: NDArray[np.int32],
        batch: int,
        at_once: int,
        tick: Tick,
    ) -> None:
        self.skeleton, self.model, self.statistics = skeleton, model, statistics
        self.tokens, self.batch, self.at_once, self.tick = tokens, batch, at_once, tick
        self._observers = ExitStack()

    def __enter__(self) -> Self:
        layout = self.statistics.layout
        self._observers.enter_context(observed(self.skeleton, self.model, layout, self.statistics))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observers.close()

    def total(self) -> int:
        return -(-len(self.tokens) // self.batch)

    def done(self, cursor: Cursor) -> int:
        return cursor.batch

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        together = max(1, self.at_once // self.batch)
        for number in range(cursor.batch, self.total(), together):
            batches = range(number, min(number + together, self.total()))
            windows = self.tokens[number * self.batch : batches.stop * self.batch]
            for part in torch.from_numpy(windows.astype(np.int64)).split(self.at_once):
                forward(self.model, part)
            for batch in batches:
                self.tick(self.tokens[batch * self.batch : (batch + 1) * self.batch].size)
            done = self.tokens[: batches.stop * self.batch].size
            yield Step(Cursor(batch=batches.stop), batches.stop == self.total(), done)


def forward(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """One forward of [batch, seq] token ids, without logits and without a KV cache (modelopt's o_proj amax is
    0 with one).
    """
    with torch.inference_mode(), without_logits(model):
        model(input_ids=windows.to(model.device), use_cache=False)
