"""Seconds and peak memory of Holdfast's export, modelopt's, and a plain copy, each in a fresh process."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.exporters import MARK
from benchmarks.memory import PeakMemory
from benchmarks.models import SHARD_SIZE, Subject
from benchmarks.section import Section

RECIPES = ("nvfp4", "fp8")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Measured:
    """One export. Bytes are anonymous memory above that of the imports; `held` when the export begins."""

    preparing: float
    exporting: float
    held: float
    peak: float
    gpu_peak: float


def compare_exports(subject: Subject, scratch: Path, device: torch.device, repeat: int) -> Section:
    """Calibrate the subject once, then export it with each exporter in each format, `repeat` times."""
    run = subject.calibrated(scratch / "export-run", device)
    kinds = [("copy", "", "plain copy of the source, with fsync")]
    for recipe in RECIPES:
        kinds.append(("holdfast", recipe, f"Holdfast, {recipe}: plan and export, with fsync"))
        kinds.append(("modelopt", recipe, f"modelopt, {recipe}: export_hf_checkpoint"))
    results: dict[tuple[str, str], Measured] = {}
    for kind, recipe, _ in kinds:
        rounds = [_measured(kind, subject.model, run, recipe, scratch, device) for _ in range(repeat)]
        results[kind, recipe] = _median(rounds)
    shutil.rmtree(run)
    return _section(subject, kinds, results, device)


def _measured(
    kind: str, model: Path, run: Path, recipe: str, scratch: Path, device: torch.device
) -> Measured:
    """Run one export in its own process and watch its memory.

    Raises RuntimeError with the process's last words when it fails.
    """
    out, log = scratch / "export-out", scratch / "export-log"
    arguments = [kind, str(model), str(run), str(out), recipe, str(device)]
    command = [sys.executable, "-m", "benchmarks.exporters", *arguments]
    os.sync()  # what others left to be written is not this export's to wait for
    phases: dict[str, dict[str, float]] = {}
    memory: PeakMemory | None = None
    with (
        log.open("w+") as words,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True, cwd=ROOT) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                facts = json.loads(line.removeprefix(MARK))
                phases[facts.pop("phase")] = facts
                if memory is None:  # the imports are done
                    memory = PeakMemory(process.pid)
        peak = memory.finish() if memory else 0
    if process.returncode or "exported" not in phases:
        raise RuntimeError(f"{kind} {recipe} of {model} failed:\n{log.read_text()[-2000:]}")
    shutil.rmtree(out)
    baseline = phases["imported"]["bytes"]
    told = [phase["bytes"] for phase in phases.values()]
    return Measured(
        preparing=phases["prepared"]["seconds"],
        exporting=phases["exported"]["seconds"],
        held=phases["prepared"]["bytes"] - baseline,
        peak=max(peak, *told) - baseline,
        gpu_peak=phases["exported"].get("gpu_peak", 0),
    )


def _median(rounds: list[Measured]) -> Measured:
    return Measured(
        *(statistics.median(column) for column in zip(*(vars(one).values() for one in rounds), strict=True))
    )


def _section(
    subject: Subject,
    kinds: list[tuple[str, str, str]],
    results: dict[tuple[str, str], Measured],
    device: torch.device,
) -> Section:
    copied = results["copy", ""].exporting
    on_gpu = device.type == "cuda"
    rows, figures = [], {"source_bytes": float(subject.nbytes), "copy_seconds": copied}
    for kind, recipe, title in kinds:
        one = results[kind, recipe]
        cells = [
            title,
            f"{one.preparing:.2f}" if one.preparing > 0.01 else "",
            f"{one.exporting:.2f}",
            f"{one.exporting / copied:.1f} x",
            f"{one.held / 1e6:,.0f}",
            f"{one.peak / 1e6:,.0f}",
            f"{one.peak / subject.nbytes:.2f} x",
        ]
        rows.append((*cells, f"{one.gpu_peak / 1e6:,.0f}") if on_gpu else tuple(cells))
        if recipe:
            name = f"{kind}_{recipe}"
            figures |= {f"{name}_seconds": one.exporting, f"{name}_preparing_seconds": one.preparing}
            figures |= {f"{name}_peak_bytes": one.peak, f"{name}_gpu_peak_bytes": one.gpu_peak}
    notes = [
        "Memory: anonymous, above the imports. Preparing: loading and calibrating what modelopt exports."
    ]
    for recipe in RECIPES:
        ours, theirs = results["holdfast", recipe], results["modelopt", recipe]
        slower, larger = ours.exporting / theirs.exporting, ours.peak / theirs.peak
        notes.append(f"Holdfast over modelopt, {recipe}: seconds {slower:.2f} x, peak memory {larger:.2f} x")
        figures |= {
            f"{recipe}_seconds_over_modelopt": slower,
            f"{recipe}_peak_over_modelopt": larger,
            f"{recipe}_seconds_over_copy": ours.exporting / copied,
        }
    columns = ("preparing s", "export s", "over copy", "held before MB", "peak MB", "over source")
    return Section(
        title=f"3. Export of {subject.name}: {subject.nbytes / 1e6:,.0f} MB, "
        f"shards of {SHARD_SIZE / 1e6:,.0f} MB",
        columns=(*columns, "GPU peak MB") if on_gpu else columns,
        rows=tuple(rows),
        notes=tuple(notes),
        figures=figures,
    )
