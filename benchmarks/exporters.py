"""One export in a process of its own: `python -m benchmarks.exporters KIND MODEL RUN OUT RECIPE DEVICE`.

Prints a line of JSON as each phase ends: `imported`, `prepared` and `exported`, with the process's anonymous
bytes at that moment and the seconds the phase took. Imports follow the choice of KIND, so that a plain copy
is not measured with torch in memory.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory import anonymous_bytes

MARK = "benchmark phase: "
Export = Callable[[], object]
Prepare = Callable[[], Export]


def main() -> None:
    """Import, prepare, export, and tell the phases."""
    kind, model, run, out, recipe, device = sys.argv[1:]
    started = time.perf_counter()
    kinds: dict[str, Callable[[], Prepare]] = {
        "copy": lambda: plain_copy(Path(model), Path(out)),
        "holdfast": lambda: holdfast(Path(run), Path(out), recipe),
        "modelopt": lambda: modelopt(Path(model), Path(out), recipe, device),
    }
    prepare = kinds[kind]()
    started = tell("imported", started)
    export = prepare()
    started = tell("prepared", started)
    export()
    tell("exported", started)


def tell(phase: str, started: float) -> float:
    """Print the end of a phase; returns when the next one begins."""
    taken = time.perf_counter() - started
    facts: dict[str, float | str] = {"phase": phase, "seconds": taken, "bytes": anonymous_bytes(os.getpid())}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            facts["gpu_peak"] = torch.cuda.max_memory_allocated()
    print(MARK + json.dumps(facts), flush=True)
    return time.perf_counter()


def plain_copy(model: Path, out: Path) -> Prepare:
    """What a person would type: `cp -r` and `sync`."""

    def export() -> None:
        subprocess.run(["cp", "-r", str(model), str(out)], check=True)
        os.sync()

    return lambda: export


def sync_files(folder: Path) -> None:
    """Wait until a folder and all its files are on the disk."""
    for path in (*sorted(folder.iterdir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def holdfast(run: Path, out: Path, recipe: str) -> Prepare:
    """The whole stage, planning and fsync included."""
    from benchmarks.models import SHARD_SIZE
    from stages.export.run import export
    from stages.settings import ExportSettings

    import_models()
    settings = ExportSettings(run=run, out=out, recipe=recipe, shard_size=SHARD_SIZE)
    return lambda: lambda: export(settings)


def modelopt(model: Path, out: Path, recipe: str, device: str) -> Prepare:
    """`export_hf_checkpoint`, and fsync of what it wrote. It wants the calibrated model in memory: to prepare
    is to load it and to calibrate it on a few tokens. On which ones makes no difference to the exporter.
    """
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import PreTrainedModel

    from benchmarks.modelopt_calibration import quantized
    from benchmarks.models import SHARD_SIZE, load_whole

    import_models()

    def calibration_loop(observing: PreTrainedModel) -> None:
        with torch.inference_mode():
            observing(input_ids=torch.arange(256, device=device)[None], use_cache=False)

    def prepare() -> Export:
        calibrated = quantized(load_whole(model, torch.device(device), "eager"), recipe, calibration_loop)

        def export() -> None:
            with torch.inference_mode():
                export_hf_checkpoint(calibrated, export_dir=out, max_shard_size=SHARD_SIZE)
            sync_files(out)

        return export

    return prepare


def import_models() -> None:
    """What both exporters import only when they meet their first model."""
    import modelopt.torch.export
    import modelopt.torch.quantization  # noqa: F401
    from transformers import Qwen3MoeForCausalLM  # noqa: F401


if __name__ == "__main__":
    main()
