"""How long export takes to its first tensor, beside the imports it can't do without."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.section import Section
from benchmarks.timing import Timing, spread
from pipeline.demo import make_demo
from stages.calibrate.run import calibrate
from stages.progress import Silent
from stages.recipe.kept_plans import FOLDER
from stages.settings import CalibrateSettings

TORCH = "import torch, safetensors"
MODELOPT = "import modelopt.torch.quantization"
FIRST_TENSOR = """
import os, sys
from pathlib import Path
from stages.export.run import export
from stages.export.tensors import TensorMaker
from stages.settings import ExportSettings
TensorMaker.make = lambda self, spec: os._exit(0)
export(ExportSettings(run=Path(sys.argv[1]), out=Path(sys.argv[2])))
"""


def measure_start(scratch: Path, repeat: int) -> Section:
    """Seconds of whole processes on the demo, in turn."""
    demo, run = scratch / "demo", scratch / "start-run"
    make_demo(demo)
    settings = CalibrateSettings(
        model=str(demo / "model"), data=str(demo / "text.jsonl"), run=run, samples=16, seq=256
    )
    calibrate(settings, Silent())
    works = {
        TORCH: lambda: _process("-c", TORCH),
        "export, plan kept": lambda: _first_tensor(run, scratch, keep=True),
        MODELOPT: lambda: _process("-c", MODELOPT),
        "export, no plan kept": lambda: _first_tensor(run, scratch, keep=False),
        "holdfast --help": lambda: _process("-m", "holdfast", "--help"),
        "holdfast status": lambda: _process("-m", "holdfast", "status", str(run)),
    }
    for work in works.values():
        work()  # once to warm the disk's cache
    rounds = [{name: work() for name, work in works.items()} for _ in range(repeat)]
    taken = {name: spread([one[name] for one in rounds]) for name in works}
    against = {"export, plan kept": TORCH, "export, no plan kept": MODELOPT}
    return Section(
        title="0. Seconds to the first tensor of an export",
        columns=("seconds", "ratio"),
        rows=tuple(
            (name, str(timing), _ratio(taken, name, against.get(name))) for name, timing in taken.items()
        ),
        notes=("whole processes, the interpreter's start included; ratios against the import above them",),
        figures={name: timing.median for name, timing in taken.items()},
    )


def _ratio(taken: dict[str, Timing], name: str, base: str | None) -> str:
    return "" if base is None else f"{taken[name].median / taken[base].median:.2f} x"


def _first_tensor(run: Path, scratch: Path, keep: bool) -> float:
    plans, aside = run / FOLDER, scratch / "plans-aside"
    if not keep:
        plans.rename(aside)
    try:
        return _process("-c", FIRST_TENSOR, str(run), str(scratch / "start-out"))
    finally:
        if not keep:
            shutil.rmtree(plans)  # the export has kept its own
            aside.rename(plans)


def _process(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
