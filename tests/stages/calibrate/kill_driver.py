"""Kills a calibration with two streams in both sweeps, in the solver, as it goes on behind a layer, as it
keeps what is behind it, and in commits, each time in a fresh fork, and finishes it: the bytes are the same.

usage: kill_driver.py SCRATCH [all] [tuned]. Prints one JSON object: for each kind of moment the number of
kills survived. Without `all` one of each kind, in a layer between the first and the last; with `tuned` GPTQ's
rounding is tuned.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from stages.calibrate.forward.calls import BoundCall
from stages.calibrate.forward.hidden import HiddenStates
from stages.calibrate.forward.replay import Replay
from stages.calibrate.run import calibrate
from stages.calibrate.schedule import tuning
from stages.calibrate.schedule.quantized_stream import QuantizedStream
from stages.progress import Silent
from stages.solve import gptq, rounding
from state.objects import SOLUTION
from state.place import PlacedDisk
from state.reader import open_run
from tests.stages.calibrate import runs
from tests.stages.export import support

TUNED = "tuned" in sys.argv[2:]
RECIPE = "nvfp4_tuned" if TUNED else "general/ptq/nvfp4_default-kv_none-gptq"
STEPS = 6  # of tuning a layer
LAYERS, BATCHES = 3, 3
FILES, MEMORY = 1, 1 << 30

settings = partial(
    runs.settings, samples=6, batch=2, recipe=RECIPE, schedule="layerwise", device="cpu", commit_every=1e-9
)
Content = dict[str, Any]


@dataclass
class Moment:
    """Dies by SIGKILL ahead of the call number `at` of a kind; counts them."""

    at: int | None
    seen: int = 0

    def pass_by(self) -> None:
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1


def _ahead_of(owner: Any, name: str) -> Callable[[Moment], Any]:
    """A patch that tells a moment of every call of a function."""
    original = getattr(owner, name)

    def watched(moment: Moment) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            moment.pass_by()
            return original(*args, **kwargs)

        return patch.object(owner, name, call)

    return watched


@contextmanager
def _first_sweep(moment: Moment) -> Iterator[None]:
    """Ahead of each batch of the first stream: what runs a layer and is no replay."""
    run, call, replaying = BoundCall.run, Replay.call, [False]

    def counted(self: BoundCall, *args: Any) -> Any:
        if not replaying[0]:
            moment.pass_by()
        return run(self, *args)

    def replayed(self: Replay, *args: Any) -> Any:
        replaying[0] = True
        try:
            return call(self, *args)
        finally:
            replaying[0] = False

    with patch.object(BoundCall, "run", counted), patch.object(Replay, "call", replayed):
        yield


@contextmanager
def _commit(moment: Moment) -> Iterator[None]:
    """Ahead of each file that a commit writes, names or publishes."""
    before = PlacedDisk.before

    def watched(self: PlacedDisk, operation: str, path: Path) -> None:
        if operation in ("put", "rename", "publish") and "activations" not in path.parts:
            moment.pass_by()
        before(self, operation, path)

    with patch.object(PlacedDisk, "before", watched):
        yield


# A tuned layer has more windows than the text: 6, 5 that begin later and 6 with other tokens.
STREAMED = BATCHES + 6 if TUNED else BATCHES
# They go through the second stream once more, to weigh the tokens, and some of them to see what came of it.
SWEPT = 2 * STREAMED + len(range(0, STREAMED, tuning.CHECKED)) if TUNED else STREAMED
KINDS: dict[str, tuple[Callable[[Moment], Any], int]] = {
    "first sweep": (_first_sweep, 0 if TUNED else LAYERS * BATCHES),
    "second sweep": (_ahead_of(Replay, "run"), LAYERS * SWEPT),
    "solver": (_ahead_of(gptq, "solve_latent" if TUNED else "solve"), LAYERS * 4),
    "going on": (_ahead_of(QuantizedStream, "advance"), LAYERS),
    "writing behind": (_ahead_of(HiddenStates, "write"), LAYERS * STREAMED * 2),
    "sealing": (_ahead_of(HiddenStates, "seal"), (LAYERS - 1) * 2),
    "committing": (_commit, 0),
}
if TUNED:
    KINDS["tuning"] = (_ahead_of(tuning, "rate_of"), LAYERS * STEPS)
"""Kind → how its moments are watched, and how many there are; 0: so many that some are taken."""


def make(inputs: Path, run: Path, memory: int) -> None:
    with patch.object(rounding, "STEPS", STEPS):
        calibrate(settings(inputs, run, activation_memory=memory), Silent())


def content(run: Path) -> Content:
    """All that a run is for: statistics, solutions with what is said of them, and no file that is left."""
    calibration = open_run(run)
    assert calibration.head.finished
    found: Content = {path: values.tobytes() for path, values in calibration.generation().arrays.items()}
    for path in calibration.head.objects:
        if match := SOLUTION.fullmatch(path):
            solution = calibration.solution(match[1], int(match[2]))
            found |= {f"{path}/{name}": values.tobytes() for name, values in solution.arrays.items()}
            found[path] = dict(solution.attributes)
    found["left"] = (run / "activations").exists()
    return found


def killed(inputs: Path, run: Path, memory: int, kind: str, at: int) -> bool:
    """Calibrate in a fork that dies at a moment; False when it finished before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with KINDS[kind][0](Moment(at)):
                make(inputs, run, memory)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{kind} {at}: the calibration failed")
    return os.WIFSIGNALED(status)


def survive(inputs: Path, run: Path, whole: Content, memory: int, kind: str, at: int, twice: bool) -> None:
    """Kill once, or once more as it goes on; the same command then ends with the same bytes."""
    shutil.rmtree(run, ignore_errors=True)
    if not killed(inputs, run, memory, kind, at):
        raise SystemExit(f"{kind} {at}: nothing was killed")
    if twice:
        killed(inputs, run, memory, kind, at // 2)
    make(inputs, run, memory)
    if (found := content(run)) != whole:
        differing = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
        raise SystemExit(f"{kind} {at}, memory {memory}: other bytes in {differing[:5]}")


def counted(inputs: Path, run: Path) -> dict[str, int]:
    """How many moments of each kind an undisturbed calibration has."""
    counting = {kind: Moment(None) for kind in KINDS}
    with ExitStack() as stack:
        for kind, (watched, _) in KINDS.items():
            stack.enter_context(watched(counting[kind]))
        make(inputs, run, FILES)
    for kind, (_, expected) in KINDS.items():
        if expected and counting[kind].seen != expected:
            raise SystemExit(f"{kind}: {counting[kind].seen} moments, {expected} were expected")
    return {kind: moment.seen for kind, moment in counting.items()}


def main() -> None:
    scratch, every = Path(sys.argv[1]), "all" in sys.argv[2:]
    torch.set_num_threads(1)  # a fork has none of the others
    inputs = scratch / "inputs"
    support.make_model(inputs / "model", support.config_of("qwen3_moe", num_hidden_layers=LAYERS))
    support.make_text(inputs / "text.jsonl")
    counts = counted(inputs, scratch / "whole")
    whole = content(scratch / "whole")
    survived = {}
    for kind, (_, expected) in KINDS.items():
        step = 1 if 0 < expected <= 20 else counts[kind] // 20
        chosen = range(0, counts[kind], step) if every else [counts[kind] // 2]
        for at in chosen:
            survive(inputs, scratch / "run", whole, FILES, kind, at, twice=every)
            if every:
                survive(inputs, scratch / "run", whole, MEMORY, kind, at, twice=False)
        survived[kind] = len(chosen) * (1 + every)
    print(json.dumps(survived))


if __name__ == "__main__":
    main()
