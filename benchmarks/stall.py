"""What one commit costs the forward pass, with the state of a model of 23,500 quantizers.

Two costs are kept apart: the seconds in which the forward's thread waits (copying the statistics, handing
them to the writer's thread), and the seconds by which forwards that run beside the writer take longer.
"""

import statistics
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.models import Subject
from benchmarks.section import Section
from benchmarks.timing import seconds, spread, synchronize
from stages.calibrate.accumulate import Accumulators
from stages.calibrate.arrays import STATISTICS_OF
from stages.calibrate.load import load_model
from stages.calibrate.whole import forward
from state.background import BackgroundWriter
from state.head import Cursor
from state.identity import Environment, Identity, tokens_digest
from state.layout import Layout, Site, arrange
from state.record import RunRecord, SourceDescription
from state.store import RunWriter
from state.update import Generation, Update

# 195 MB of statistics, with gate and up sharing one observation as they do in every run.
LAYERS, EXPERTS, HIDDEN, WIDTH = 30, 128, 2816, 1408
COMMIT_EVERY = 30.0


@dataclass(frozen=True)
class Commit:
    """Seconds of one commit: the forward waits, forwards beside it take longer, the writer works."""

    wait: float
    slowdown: float
    writing: float


def measure_stall(subject: Subject, scratch: Path, device: torch.device, repeat: int) -> Section:
    """Commit `repeat` times while the subject's forwards run, and compare them with forwards alone."""
    layout, quantizers = simulated_layout()
    filled = simulated_statistics(layout, device)
    nbytes = sum(values.nbytes for values in filled.snapshot().values())
    model = load_model(subject.model, device, "grouped_mm")
    batches = torch.from_numpy(subject.tokens()).long().to(device).split(subject.batch)
    commits: list[Commit] = []
    written: list[float] = []
    with (
        _empty_run(scratch / "stall") as writer,
        BackgroundWriter(writer, lambda _head, taken: written.append(taken)) as background,
    ):
        for number in range(repeat + 1):  # the first one warms up
            alone = statistics.median(
                seconds(lambda batch=batch: forward(model, batch), device)  # type: ignore[misc]
                for batch in batches
            )
            started = time.perf_counter()
            newest = Generation(layout, filled.snapshot())
            background.submit(Update(Cursor(batch=number), False, newest))
            wait = time.perf_counter() - started
            slowdown = _slowdown(model, batches, background, alone, device)
            background.wait()
            commits.append(Commit(wait, slowdown, written[-1]))
    return _section(commits[1:], quantizers, nbytes)


def _slowdown(
    model: PreTrainedModel,
    batches: tuple[torch.Tensor, ...],
    background: BackgroundWriter,
    alone: float,
    device: torch.device,
) -> float:
    """Run forwards until the commit is written: the seconds they take beyond `alone` seconds each."""
    started, count = time.perf_counter(), 0
    for batch in cycle(batches):
        if not background.busy:
            break
        forward(model, batch)
        synchronize(device)
        count += 1
    return time.perf_counter() - started - count * alone


def _section(commits: list[Commit], quantizers: int, nbytes: int) -> Section:
    parts = {
        "the forward's thread waits": [commit.wait for commit in commits],
        "forwards beside the writer take longer by": [commit.slowdown for commit in commits],
        "both": [commit.wait + commit.slowdown for commit in commits],
    }
    timings = {name: spread(taken) for name, taken in parts.items()}
    writing = spread([commit.writing for commit in commits])
    wait, slowdown, both = (timing.median for timing in timings.values())
    shares = tuple(
        (name, str(timing), f"{timing.median / COMMIT_EVERY:.2%}") for name, timing in timings.items()
    )
    return Section(
        title=f"2. One commit of {quantizers:,} quantizers, {nbytes / 1e6:,.0f} MB",
        columns=("seconds: median (range)", f"of {COMMIT_EVERY:.0f} s between commits"),
        rows=(*shares, ("(the writer's thread works)", str(writing), "")),
        notes=("Aim: the stall at most 1 %.",),
        figures={
            "quantizers": quantizers,
            "bytes": nbytes,
            "wait_seconds": wait,
            "slowdown_seconds": slowdown,
            "writing_seconds": writing.median,
            "wait_share": wait / COMMIT_EVERY,
            "wait_and_slowdown_share": both / COMMIT_EVERY,
        },
    )


def simulated_layout() -> tuple[Layout, int]:
    """The layout of a mixture of LAYERS x EXPERTS experts with attention and routers, and how many input and
    weight quantizers modelopt's names for it would count.
    """
    modules: dict[str, int] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            modules[f"{prefix}.self_attn.{leaf}"] = HIDDEN
        modules[f"{prefix}.mlp.gate"] = HIDDEN
        for expert in range(EXPERTS):
            experts = f"{prefix}.mlp.experts.{expert}"
            modules |= {f"{experts}.gate_proj": HIDDEN, f"{experts}.up_proj": HIDDEN}
            modules[f"{experts}.down_proj"] = WIDTH
    shared = "model.layers.L.mlp.experts.E.up_proj.input"
    channels: dict[Site, int | None] = {Site(module, "weight"): None for module in modules}
    channels |= {
        Site(module, "input"): width for module, width in modules.items() if not module.endswith(".up_proj")
    }
    layout = Layout(
        arrays=arrange(channels, STATISTICS_OF),
        aliases={shared: shared.replace("up_proj", "gate_proj")},
        quantizers={},
        relations=(),
    )
    return layout, 2 * len(modules)


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
    return RunWriter.create(path, record, tokens)
