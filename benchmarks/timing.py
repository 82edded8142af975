"""Wall-clock seconds, with everything a GPU was given finished before and after."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work over several rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def interleaved(
    works: Mapping[str, Callable[[], object]], device: torch.device, repeat: int
) -> dict[str, Timing]:
    """Time every work `repeat` times after one warm-up, all in turn, so that a drift of the machine hits them
    alike.
    """
    for work in works.values():
        work()
    rounds = [{name: seconds(work, device) for name, work in works.items()} for _ in range(repeat)]
    return {name: spread([taken[name] for taken in rounds]) for name in works}


def spread(taken: list[float]) -> Timing:
    """Median and range of some seconds."""
    return Timing(statistics.median(taken), min(taken), max(taken))
