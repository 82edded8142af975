"""The whole-model schedule: the model stays on the device, batches of windows stream through it."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stages.calibrate.head import without_logits
from stages.calibrate.schedule import Step
from state.store import Cursor


class WholeModel:
    """One pass; a step is one batch.

    Args:
        tokens: int32 [windows, seq]. batch: windows per forward; the last batch may be smaller.
    """

    def __init__(self, model: PreTrainedModel, tokens: NDArray[np.int32], batch: int) -> None:
        self.model, self.tokens, self.batch = model, tokens, batch

    def total(self) -> int:
        return -(-len(self.tokens) // self.batch)

    def done(self, cursor: Cursor) -> int:
        return cursor.batch

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        for number in range(cursor.batch, self.total()):
            windows = self.tokens[number * self.batch : (number + 1) * self.batch]
            forward(self.model, torch.from_numpy(windows.astype(np.int64)))
            yield Step(
                Cursor(pass_number=cursor.pass_number, layer=cursor.layer, batch=number + 1), windows.size
            )


def forward(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """One forward of [batch, seq] token ids, without logits and without a KV cache (modelopt's o_proj amax is
    0 with one).
    """
    with torch.inference_mode(), without_logits(model):
        model(input_ids=windows.to(model.device), use_cache=False)
