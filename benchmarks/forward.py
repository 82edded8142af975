"""What observing costs: the bare forward, Holdfast's calibration and modelopt's, over the same tokens.

All run through the same loop, without logits. modelopt gets a model of its own, with experts one by one;
everything is timed in turn within its calibration, whose quantizers touch no other model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.modelopt_calibration import quantized
from benchmarks.models import Subject, load_whole
from benchmarks.section import Section
from benchmarks.timing import Timing, interleaved
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.arrays import plan_layout
from stages.calibrate.observe.attach import observed
from stages.calibrate.observe.relations import probe
from stages.calibrate.schedule.whole import forward
from stages.model.skeleton import Skeleton, load_config
from state.source import Source

BARE = "bare forward, grouped experts"
OURS = "Holdfast: the same, observed"
EAGER = "bare forward, experts one by one"
MODELOPT = "modelopt: max calibration, NVFP4"


@dataclass(frozen=True)
class Pass:
    """Forwards over all windows. tokens: int32 [windows, seq]."""

    model: PreTrainedModel
    tokens: NDArray[np.int32]
    batch: int

    def __call__(self) -> None:
        for first in range(0, len(self.tokens), self.batch):
            windows = self.tokens[first : first + self.batch].astype(np.int64)
            forward(self.model, torch.from_numpy(windows))


def compare_forwards(subject: Subject, device: torch.device, repeat: int) -> Section:
    """Seconds of each kind of pass, and their ratios to the bare forward with grouped experts."""
    tokens = subject.tokens()
    bare = Pass(load_whole(subject.model, device, "grouped_mm"), tokens, subject.batch)
    skeleton = Skeleton(load_config(subject.model), Source.open(subject.model).tensors)
    statistics = Accumulators(plan_layout(skeleton, probe(skeleton, skeleton.model)), device)

    def ours() -> None:
        with observed(skeleton, bare.model, statistics.layout, statistics):
            bare()
        statistics.snapshot()

    def eager() -> None:
        bare.model.set_experts_implementation("eager")
        bare()
        bare.model.set_experts_implementation("grouped_mm")

    timings: dict[str, Timing] = {}

    def calibration_loop(observing: PreTrainedModel) -> None:
        modelopt = Pass(observing, tokens, subject.batch)
        works: dict[str, Callable[[], None]] = {BARE: bare, OURS: ours, EAGER: eager, MODELOPT: modelopt}
        timings.update(interleaved(works, device, repeat))

    quantized(load_whole(subject.model, device, "eager"), "nvfp4", calibration_loop)
    return _section(subject, timings, tokens.size)


def _section(subject: Subject, timings: dict[str, Timing], tokens: int) -> Section:
    unit = timings[BARE].median
    return Section(
        title=f"1. Calibration of {subject.name}: {tokens:,} tokens, {subject.seq} per window, "
        f"{subject.batch} windows per forward",
        columns=("seconds: median (range)", "over the bare forward"),
        rows=tuple((name, str(taken), f"{taken.median / unit:.2f} x") for name, taken in timings.items()),
        notes=("Aim on an H200: Holdfast at most 1.10 x. Everything without logits.",),
        figures={
            "tokens": tokens,
            "bare_seconds": unit,
            "holdfast_seconds": timings[OURS].median,
            "eager_seconds": timings[EAGER].median,
            "modelopt_seconds": timings[MODELOPT].median,
            "holdfast_over_bare": timings[OURS].median / unit,
            "modelopt_over_bare": timings[MODELOPT].median / unit,
        },
    )
