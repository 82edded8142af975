"""Speed and peak memory of Holdfast's export, modelopt's, and a plain copy, each in a fresh process."""

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

AWQ_FULL, GPTQ = "nvfp4_awq_full", "general/ptq/nvfp4_default-kv_none-gptq"
NAMES = {"nvfp4": "NVFP4", "fp8": "FP8", AWQ_FULL: "AWQ full, folded", GPTQ: "GPTQ"}
OURS = tuple(NAMES)
THEIRS = ("nvfp4", "fp8")
KINDS = [
    ("copy", "", "cp -r of the source, then sync"),
    *(("holdfast", recipe, f"Holdfast, {NAMES[recipe]}") for recipe in OURS),
    *(("modelopt", recipe, f"modelopt, {NAMES[recipe]}: export_hf_checkpoint") for recipe in THEIRS),
]
COLUMNS = (
    "preparing s",
    "export s",
    "over copy",
    "M parameters/s",
    "GB/s of source",
    "held before MB",
    "peak MB",
)
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Measured:
    """One export. Bytes are anonymous memory above that of the imports; `held` when the export begins."""

    preparing: float
    exporting: float
    held: float
    peak: float
    gpu_peak: float


def compare_exports(
    subject: Subject, scratch: Path, device: torch.device, repeat: int, cold: bool = False
) -> Section:
    """Calibrate and solve the subject once, then export it with each exporter in each format, `repeat` times
    in turn.

    cold: the source is put out of the system's page cache before each.
    """
    run = scratch / "export-run"
    for recipe in ("nvfp4", AWQ_FULL, GPTQ):
        subject.calibrated(run, device, recipe)
    rounds: dict[tuple[str, str], list[Measured]] = {(kind, recipe): [] for kind, recipe, _ in KINDS}
    for _ in range(repeat):
        for kind, recipe, _ in KINDS:
            if cold:
                _evict(subject.model)
            rounds[kind, recipe].append(_measured(kind, subject.model, run, recipe, scratch, device))
    shutil.rmtree(run)
    return _section(subject, {key: _median(found) for key, found in rounds.items()}, device, cold)


def _evict(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
    subject: Subject, results: dict[tuple[str, str], Measured], device: torch.device, cold: bool
) -> Section:
    copied, parameters = results["copy", ""].exporting, subject.parameters
    on_gpu = device.type == "cuda"
    rows, figures = [], {"source_bytes": float(subject.nbytes), "copy_seconds": copied}
    for kind, recipe, title in KINDS:
        one = results[kind, recipe]
        cells = [
            title,
            f"{one.preparing:.2f}" if one.preparing > 0.01 else "",
            f"{one.exporting:.2f}",
            f"{one.exporting / copied:.1f} x",
            f"{parameters / one.exporting / 1e6:,.0f}",
            f"{subject.nbytes / one.exporting / 1e9:.2f}",
            f"{one.held / 1e6:,.0f}",
            f"{one.peak / 1e6:,.0f}",
        ]
        rows.append((*cells, f"{one.gpu_peak / 1e6:,.0f}") if on_gpu else tuple(cells))
        if recipe:
            name = f"{kind}_{NAMES[recipe].lower().replace(', ', '_').replace(' ', '_')}"
            figures |= {f"{name}_seconds": one.exporting, f"{name}_preparing_seconds": one.preparing}
            figures |= {f"{name}_peak_bytes": one.peak, f"{name}_gpu_peak_bytes": one.gpu_peak}
            figures |= {f"{name}_parameters_per_second": parameters / one.exporting}
            figures |= {f"{name}_seconds_over_copy": one.exporting / copied}
    notes = [
        "From the first read to the last fsync, planning included, imports apart; the source "
        + ("out of" if cold else "in")
        + " the page cache.",
        "Memory: anonymous, above the imports. Preparing: loading and calibrating what modelopt exports; its "
        "weights are in memory when its export begins.",
    ]
    for recipe in THEIRS:
        ours, theirs = results["holdfast", recipe], results["modelopt", recipe]
        faster, larger = theirs.exporting / ours.exporting, ours.peak / theirs.peak
        whole = (theirs.exporting + theirs.preparing) / ours.exporting
        notes.append(
            f"Holdfast beside modelopt, {NAMES[recipe]}: {faster:.2f} x as fast ({whole:.2f} x with "
            f"preparing), peak memory {larger:.2f} x"
        )
        figures |= {
            f"{recipe}_speed_over_modelopt": faster,
            f"{recipe}_speed_over_modelopt_with_preparing": whole,
            f"{recipe}_peak_over_modelopt": larger,
        }
    return Section(
        title=f"3. Export of {subject.name}: {subject.nbytes / 1e6:,.0f} MB, "
        f"shards of {SHARD_SIZE / 1e6:,.0f} MB",
        columns=(*COLUMNS, "GPU peak MB") if on_gpu else COLUMNS,
        rows=tuple(rows),
        notes=tuple(notes),
        figures=figures,
    )
