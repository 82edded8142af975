"""What one commit costs the forward pass, with the state of a model of 23,500 quantizers.

Two costs are kept apart: the seconds in which the forward's thread waits (copying the statistics, handing
them to the writer's thread), and the seconds by which forwards that run beside the writer take longer.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.models import Subject, load_whole
from benchmarks.section import Section
from benchmarks.timing import seconds, spread, synchronize
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.arrays import STATISTICS_OF
from stages.calibrate.schedule.whole import forward
from state.background import BackgroundWriter
from state.claim import create_run
from state.head import Cursor
from state.identity import Environment, Identity, tokens_digest
from state.layout import Layout, arrange
from state.names import Site
from state.record import RunRecord, SourceDescription
from state.store import RunWriter
from state.update import Generation, Update

# About 200 MB of statistics.
LAYERS, EXPERTS, HIDDEN, WIDTH, KV = 30, 128, 2816, 1408, 512
ONCE_PER_LAYER = (*(f"self_attn.{leaf}_proj" for leaf in "qkvo"), "mlp.gate")
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
COMMIT_EVERY = 30.0


@dataclass(frozen=True)
class Commit:
    """Seconds of one commit: the forward waits, forwards beside it take longer, the writer works."""

    wait: float
    slowdown: float
    writing: float


def measure_stall(subject: Subject, scratch: Path, device: torch.device, repeat: int) -> Section:
    """Commit `repeat` times while the subject's forwards run, and compare these with forwards alone."""
    layout, quantizers = simulated_layout()
    filled = simulated_statistics(layout, device)
    nbytes = sum(values.nbytes for values in filled.snapshot().values())
    model = load_whole(subject.model, device, "grouped_mm")
    batches = torch.from_numpy(subject.tokens()).long().to(device).split(subject.batch)
    taken: list[float] = []
    with (
        _empty_run(scratch / "stall") as writer,
        BackgroundWriter(writer, lambda _head, written: taken.append(written)) as background,
    ):
        cpu_seconds = [_undisturbed(filled, background) for _ in range(2)][-1]  # the first warms up
        commits = []
        for _ in range(repeat):
            before = _per_forward(model, batches, device)
            started = time.perf_counter()
            background.submit(Update(Cursor(), False, Generation(layout, filled.snapshot())))
            wait = time.perf_counter() - started
            beside, count = _until_written(model, batches, background, device)
            background.wait()
            alone = (before + _per_forward(model, batches, device)) / 2
            commits.append(Commit(wait, beside - count * alone, taken[-1]))
    return _section(commits, cpu_seconds, quantizers, nbytes)


def _undisturbed(filled: Accumulators, background: BackgroundWriter) -> float:
    """CPU seconds of this process for one commit with nothing beside it: they hardly depend on other work."""
    started = time.process_time()
    background.submit(Update(Cursor(), False, Generation(filled.layout, filled.snapshot())))
    background.wait()
    return time.process_time() - started


def _per_forward(model: PreTrainedModel, batches: tuple[torch.Tensor, ...], device: torch.device) -> float:
    """Median seconds of a forward with nothing beside it."""
    return statistics.median(seconds(partial(forward, model, batch), device) for batch in batches)


def _until_written(
    model: PreTrainedModel,
    batches: tuple[torch.Tensor, ...],
    background: BackgroundWriter,
    device: torch.device,
) -> tuple[float, int]:
    """Run forwards until the commit is written. Returns the seconds they take and how many they are."""
    started, count = time.perf_counter(), 0
    for batch in cycle(batches):
        if not background.busy:
            break
        forward(model, batch)
        synchronize(device)
        count += 1
    return time.perf_counter() - started, count


def _section(commits: list[Commit], cpu_seconds: float, quantizers: int, nbytes: int) -> Section:
    timings = {
        "the forward's thread waits": spread([commit.wait for commit in commits]),
        "forwards beside the writer take longer by": spread([commit.slowdown for commit in commits]),
        "both": spread([commit.wait + commit.slowdown for commit in commits]),
    }
    wait, slowdown, both = (timing.median for timing in timings.values())
    shares = tuple(
        (name, str(timing), f"{timing.median / COMMIT_EVERY:.2%}") for name, timing in timings.items()
    )
    writing = spread([commit.writing for commit in commits])
    return Section(
        title=f"2. One commit of {quantizers:,} quantizers, {nbytes / 1e6:,.0f} MB",
        columns=("seconds: median (range)", f"of {COMMIT_EVERY:.0f} s between commits"),
        rows=(
            *shares,
            ("(the writer takes, beside the forwards)", str(writing), ""),
            ("(CPU seconds of copy and writer)", f"{cpu_seconds:.3f}", f"{cpu_seconds / COMMIT_EVERY:.2%}"),
        ),
        notes=(
            "Aim: the stall at most 1 %. Where forwards use every core, the writer's CPU seconds are theirs.",
        ),
        figures={
            "quantizers": quantizers,
            "bytes": nbytes,
            "wait_seconds": wait,
            "slowdown_seconds": slowdown,
            "writing_seconds": writing.median,
            "cpu_seconds": cpu_seconds,
            "wait_share": wait / COMMIT_EVERY,
            "wait_and_slowdown_share": both / COMMIT_EVERY,
        },
    )


def simulated_layout() -> tuple[Layout, int]:
    """The layout that a mixture of LAYERS x EXPERTS experts gets, with attention and routers, and how many
    input and weight quantizers it stands for: one of each per projection.
    """
    channels: dict[Site, int | None] = {}
    weights: list[Site] = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        widths = {f"{prefix}.{leaf}": HIDDEN for leaf in ONCE_PER_LAYER}
        for expert in range(EXPERTS):
            widths |= {f"{prefix}.mlp.experts.{expert}.{leaf}": HIDDEN for leaf in ("gate_proj", "up_proj")}
            widths[f"{prefix}.mlp.experts.{expert}.down_proj"] = WIDTH
        weights += [Site(module, "weight") for module in widths]
        channels |= {
            Site(module, "input"): width
            for module, width in widths.items()
            if module.rpartition(".")[2] not in SAME_INPUT
        }
        channels |= {Site(f"{prefix}.self_attn", "k"): KV, Site(f"{prefix}.self_attn", "v"): KV}
    channels |= dict.fromkeys(weights)
    parents = {leaf: "mlp.experts.E" if leaf == "up_proj" else "self_attn" for leaf in SAME_INPUT}
    aliases = {
        f"model.layers.L.{parents[leaf]}.{leaf}.input": f"model.layers.L.{parents[leaf]}.{first}.input"
        for leaf, first in SAME_INPUT.items()
    }
    layout = Layout(arrays=arrange(channels, STATISTICS_OF), aliases=aliases, quantizers={}, relations=())
    return layout, 2 * len(weights)


def simulated_statistics(layout: Layout, device: torch.device) -> Accumulators:
    """Statistics in which every site was observed, with values that do not compress."""
    filled = Accumulators(layout, device)
    for values in (*filled.amax.values(), *filled.total.values(), *filled.weights.values()):
        values.uniform_(0, 9)
    for tokens in filled.tokens.values():
        tokens.fill_(1000)
    return filled


def _empty_run(path: Path) -> RunWriter:
    tokens = np.zeros((1, 1), dtype=np.int32)
    identity = Identity(tensors={}, config={}, tokenizer={}, tokens=tokens_digest(tokens), statistics=())
    nowhere = Environment(
        torch="", transformers="", modelopt="", device="", experts="", dtype="", batch=1, threads=1
    )
    record = RunRecord(
        settings={},
        identity=identity,
        environment=nowhere,
        source=SourceDescription(model="simulated"),
        generator={},
    )
    return create_run(path, record, tokens)
