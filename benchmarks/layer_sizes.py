"""What GPTQ and tuned rounding take at the layer sizes of models that people have, beside the bare forward.

Random weights in a few layers of each size, which are on the device throughout; a longer model takes as much
again for each layer.
"""

from pathlib import Path

import torch
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from benchmarks.models import Subject, random_model
from benchmarks.section import Section
from benchmarks.solvers import Resident
from state.identity import digest

RECIPES = {"GPTQ": "general/ptq/nvfp4_default-kv_none-gptq", "tuned": "nvfp4_tuned"}
LAYERS = 2
SAMPLES, SEQ = 128, 2048


def sizes() -> dict[str, PretrainedConfig]:
    """Two layers each."""
    shared = {"num_hidden_layers": LAYERS, "vocab_size": 8192, "head_dim": 128, "dtype": "bfloat16"}
    return {
        "Qwen3-30B-A3B": Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_attention_heads=32,
            num_key_value_heads=4,
            **shared,
        ),
        "Qwen3-8B": Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            hidden_size=4096,
            intermediate_size=12288,
            num_attention_heads=32,
            num_key_value_heads=8,
            **shared,
        ),
    }


def measure_layer_sizes(scratch: Path, device: torch.device) -> Section:
    """Seconds of a layer for each solver, and whether a second pass finds the same bytes."""
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    for name, config in sizes().items():
        subject = random_model(scratch / name, device, config, SAMPLES, SEQ)
        rows += _measure(name, subject, device, scratch / name, figures)
    return Section(
        title=f"8. Solvers at the layer sizes of larger models, {SAMPLES} x {SEQ:,} tokens",
        columns=("seconds a layer", "over the bare forward", "per 10^9 parameters", "a second pass"),
        rows=tuple(rows),
        notes=("Collecting is the forward with statistics; solving holds the second stream's sweeps.",),
        figures=figures,
    )


def _measure(
    name: str, subject: Subject, device: torch.device, scratch: Path, figures: dict[str, float]
) -> list[tuple[str, ...]]:
    resident = Resident(subject, device, scratch / "layerwise", RECIPES)
    tokens = subject.tokens()
    resident.forward(tokens)
    bare = resident.forward(tokens) / LAYERS
    rows: list[tuple[str, ...]] = [(f"{name}: forward, layer by layer", f"{bare:.3f}", "1.00 x", "", "")]
    figures[f"{name}/forward"] = bare
    for solver, recipe in RECIPES.items():
        resident.solve(tokens, recipe)
        first = _digests(resident)
        collecting, solving = (taken / LAYERS for taken in resident.solve(tokens, recipe))
        same = "the same bytes" if _digests(resident) == first else "other bytes"
        for part, taken in (("collecting", collecting), ("solving", solving)):
            each = taken / (resident.parameters / LAYERS) * 1e9
            cells = f"{taken:.3f}", f"{taken / bare:.2f} x", f"{each:.2f}", same if part == "solving" else ""
            rows.append((f"{name}: {solver}, {part}", *cells))
            figures[f"{name}/{solver}/{part}"] = taken
    return rows


def _digests(resident: Resident) -> list[str]:
    """Of every array that the last pass found."""
    return [
        digest(values.tobytes())
        for solution in resident.solutions
        for _, values in sorted(solution.arrays.items())
    ]
