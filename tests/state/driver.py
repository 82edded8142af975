"""A small calibration without torch: makes a run, commits it in three steps, and goes on wherever it was cut
short.

python -m tests.state.driver RUN [--kill-at K]      # SIGKILL itself at disk operation K
"""

import argparse
import os
import signal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from state.claim import create_run
from state.durable import Disk
from state.head import Cursor
from state.identity import Environment, Identity, flatten, tensor_digest, tokens_digest
from state.layout import Layout, arrange
from state.names import Site
from state.reader import open_run
from state.record import RunRecord, SourceDescription
from state.recovery import published
from state.statistics import empty, merge
from state.store import RunWriter
from state.update import Generation, Solution, Update

Arrays = dict[str, NDArray[np.generic]]

BATCHES = 3
LAYERS = (0, 2)
EXPERTS = 3
TOKENS = np.arange(24, dtype=np.int32).reshape(4, 6)

RECORD = RunRecord(
    settings={"samples": 4, "seq": 6},
    identity=Identity(
        tensors={"model.norm.weight": tensor_digest("F32", (2,), bytes(8))},
        config=flatten({"hidden_size": 2, "rope_parameters": {"rope_theta": 10000.0}}),
        tokenizer={"tokenizer.json": "xxh3:" + 32 * "0"},
        tokens=tokens_digest(TOKENS),
        statistics=("amax", "tokens"),
    ),
    environment=Environment(
        torch="2.13",
        transformers="5.14",
        modelopt="0.47",
        device="cpu",
        experts="eager",
        dtype="bfloat16",
        batch=1,
        threads=1,
    ),
    source=SourceDescription(model="models/tiny"),
    generator={"holdfast": "0.1.0"},
)


def layout() -> Layout:
    """Layers 0 and 2 with three experts each, and an lm_head outside of the layers."""
    channels: dict[Site, int | None] = {Site("lm_head", "input"): 2}
    for layer in LAYERS:
        for expert in range(EXPERTS):
            channels[Site(f"model.layers.{layer}.mlp.experts.{expert}.gate_proj", "input")] = 2
    return Layout(arrays=arrange(channels, {"input": ("amax", "tokens")}))


def observed(batch: int) -> Generation:
    """What batch `batch` alone measures. Expert 2 never sees a token; channel 0 of lm_head is dead."""
    arrays: Arrays = {}
    for array in layout().arrays:
        for name in array.statistics:
            values = empty(name, array.shape(name))
            ramp = np.arange(values.size).reshape(values.shape) + batch + 1
            seen = np.s_[:, :2] if array.experts else np.s_[...]
            values[seen] = ramp[seen]
            if array.pattern == "lm_head" and name == "amax":
                values[0] = 0
            arrays[f"{name}/{array.key}"] = values
    return Generation(layout(), arrays)


def statistics_after(batches: int) -> Arrays:
    """All arrays after the first `batches` batches."""
    total = dict(observed(0).arrays)
    for batch in range(1, batches):
        total = merged(total, dict(observed(batch).arrays))
    return total


def merged(a: Arrays, b: Arrays) -> Arrays:
    return {key: merge(key.partition("/")[0], a[key], b[key]) for key in a}


def drive(run: Path, disk: Disk | None = None, until: int = BATCHES) -> tuple[str, ...]:
    """Create or resume `run` and commit batch by batch up to `until`. Gives the notes of recovery."""
    disk = disk or Disk()
    exists = published(run, disk)
    writer = RunWriter.resume(run, disk) if exists else create_run(run, RECORD, TOKENS, disk)
    with writer:
        reader = open_run(run)
        total = dict(reader.generation().arrays)
        for batch in range(writer.head.cursor.batch, until):
            total = merged(total, dict(observed(batch).arrays)) if total else dict(observed(batch).arrays)
            writer.commit(
                Update(
                    Cursor(batch=batch + 1),
                    finished=batch + 1 == BATCHES,
                    generation=Generation(layout(), total),
                    solutions=solutions(batch),
                )
            )
    return writer.notes


def solutions(batch: int) -> tuple[Solution, ...]:
    """One solution, found with batch 1."""
    arrays = {"scale": np.array([0.5, 2.0], np.float32), "order": np.array([1, 0], np.int64)}
    return (Solution("awq-test", 2, arrays, {"alpha": 0.5}),) if batch == 1 else ()


class KillingDisk(Disk):
    """Kills its own process at operation `kill_at`, as an outside SIGKILL would."""

    def __init__(self, kill_at: int) -> None:
        self.left = kill_at

    def before(self, operation: str, path: Path) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--kill-at", type=int, default=-1)
    given = parser.parse_args()
    drive(given.run, KillingDisk(given.kill_at))
