"""All benchmarks in one run: `make bench`, or `make bench ARGS="--device cuda"`.

Prints, each with its ratios: how soon an export reaches its first tensor; the bare forward, Holdfast's
calibration and modelopt's; what a commit of 23,500 quantizers costs the forward; speed and peak memory of
both exporters beside a plain copy; what collecting and solving cost, beside modelopt's AWQ on a GPU; the loss
and distance of every solver, where HOLDFAST_SHARED names a folder with the trained test model.
"""

import argparse
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.export import compare_exports
from benchmarks.forward import compare_forwards
from benchmarks.held_out import measure_held_out
from benchmarks.layer_sizes import measure_layer_sizes
from benchmarks.layers import measure_layers
from benchmarks.models import for_export, for_forward, trained_model
from benchmarks.quality import measure_quality
from benchmarks.section import Section
from benchmarks.solvers import compare_solvers
from benchmarks.stall import measure_stall
from benchmarks.start import measure_start
from stages.calibrate.forward.whole_model import pick_device

PARTS = ("start", "forward", "stall", "export", "solvers", "quality")
LARGE = "layers"  # writes a model of 12.6 GB first
SIZES = "sizes"  # layers that take a GPU
HELD_OUT = "held-out"  # trains two models first


def main() -> None:
    """Run the parts asked for and print each as soon as it is measured."""
    warnings.simplefilter("ignore")
    arguments = _arguments()
    device = pick_device(arguments.device)
    console = Console(width=140, highlight=False)
    begun = header(device)
    console.print(begun)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=arguments.scratch) as scratch:
        for section in sections(arguments, Path(scratch), device):
            console.print()
            console.print(section.table())
            figures[section.title] = dict(section.figures)
    console.print(f"\n{load()}")
    if arguments.json is not None:
        content = {"header": begun, "footer": load(), "parts": figures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sections(arguments: argparse.Namespace, scratch: Path, device: torch.device) -> Iterator[Section]:
    """Measure part by part."""
    if "start" in arguments.parts:
        yield measure_start(scratch, arguments.repeat)
    if SIZES in arguments.parts:
        yield measure_layer_sizes(scratch, device)
    if HELD_OUT in arguments.parts:
        yield measure_held_out(scratch)
    if not set(arguments.parts) - {"start", SIZES, HELD_OUT}:
        return
    subject = for_forward(scratch, device)
    if "forward" in arguments.parts:
        yield compare_forwards(subject, device, arguments.repeat)
    if "stall" in arguments.parts:
        yield measure_stall(subject, scratch, device, arguments.repeat)
    if "export" in arguments.parts:
        for exported in for_export(scratch, device, subject):
            yield compare_exports(exported, scratch, device, arguments.exports, arguments.cold)
    if "solvers" in arguments.parts:
        yield compare_solvers(subject, device, scratch, arguments.repeat)
    trained = trained_model()
    if "quality" in arguments.parts and trained is not None:
        yield from measure_quality(trained, scratch)
    if LARGE in arguments.parts:
        yield measure_layers(subject, scratch)


def header(device: torch.device) -> str:
    """The machine and the versions."""
    names = ("torch", "transformers", "nvidia-modelopt", "zarr")
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{gpu}; "
        f"{', '.join(f'{name} {version(name)}' for name in names)}\n{load()}"
    )


def load() -> str:
    """How busy the machine is: timings taken beside other work are of little use."""
    return "load average over 1, 5 and 15 minutes: " + ", ".join(f"{value:.1f}" for value in os.getloadavg())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with a random 0.9 B Qwen3-MoE")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of forwards and commits (default 5)")
    parser.add_argument("--exports", type=int, default=1, help="processes per exporter (default 1)")
    parser.add_argument(
        "--cold", action="store_true", help="export from a source that is not in the page cache"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=(*PARTS, LARGE, SIZES, HELD_OUT),
        default=PARTS,
        help=f"default: all but {LARGE}, {SIZES} and {HELD_OUT}",
    )
    parser.add_argument("--scratch", type=Path, help="folder for models and checkpoints, on a real disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
