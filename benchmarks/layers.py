"""Peak memory of the layerwise schedule, on a model whose weights are many times larger than it.

Run by `bench.py` for the table; `python -m benchmarks.layers MODEL DATA RUN` is the process it watches.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from benchmarks.memory import PeakMemory, anonymous_bytes
from benchmarks.models import Subject
from benchmarks.section import Section
from stages.calibrate.run import calibrate
from stages.progress import Silent
from stages.settings import CalibrateSettings
from state.source import Source

LAYERS, EXPERTS, HIDDEN, WIDTH, HEAD, KV_HEADS = 96, 20, 1024, 1024, 64, 4
LAYERS_PER_SHARD = 8
READY = "ready"
ROOT = Path(__file__).parent.parent


def measure_layers(subject: Subject, scratch: Path) -> Section:
    """Calibrate a random model of 96 layers layer by layer in a process of its own, and watch its memory.

    Raises RuntimeError with the process's last words when it fails.
    """
    model, log = scratch / "layers-model", scratch / "layers-log"
    write_checkpoint(model, subject)
    command = [
        sys.executable,
        "-m",
        "benchmarks.layers",
        str(model),
        str(subject.data),
        str(scratch / "layers-run"),
    ]
    started = time.monotonic()
    with (
        log.open("w+") as words,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True, cwd=ROOT) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        imported = anonymous_bytes(process.pid)
        memory = PeakMemory(process.pid)
        process.wait()
        peak = memory.finish()
    if process.returncode:
        raise RuntimeError(f"calibrating {model} layer by layer failed:\n{log.read_text()[-2000:]}")
    weights = sum(entry.nbytes for entry in Source.open(model).tensors.values())
    rows = {
        "weights": weights / 1e6,
        "one layer": weights / LAYERS / 1e6,
        "peak, anonymous": peak / 1e6,
        "of that, imports alone": imported / 1e6,
    }
    return Section(
        title=f"4. Memory of calibrating {LAYERS} layers one by one, on a CPU",
        columns=("MB",),
        rows=tuple((name, f"{value:,.0f}") for name, value in rows.items()),
        notes=(f"The weights are {weights / peak:.1f} times the memory used.",),
        figures={
            "weight_bytes": weights,
            "peak_bytes": peak,
            "imported_bytes": imported,
            "weights_over_peak": weights / peak,
            "seconds": time.monotonic() - started,
        },
    )


def write_checkpoint(folder: Path, subject: Subject) -> None:
    """A random Qwen3-MoE, a few layers per shard, with the subject's tokenizer and vocabulary."""
    folder.mkdir(parents=True)
    for path in subject.model.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    vocabulary = json.loads((subject.model / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for first in range(0, LAYERS, LAYERS_PER_SHARD):
        shapes: dict[str, tuple[int, ...]] = {}
        if first == 0:
            shapes |= {"model.embed_tokens": (vocabulary, HIDDEN), "lm_head": (vocabulary, HIDDEN)}
            shapes["model.norm"] = (HIDDEN,)
        for layer in range(first, first + LAYERS_PER_SHARD):
            shapes |= layer_shapes(f"model.layers.{layer}")
        tensors = {
            f"{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for name, shape in shapes.items()
        }
        shard = f"model-{first:05d}.safetensors"
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        dtype="bfloat16",
    ).save_pretrained(folder)


def layer_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """Module in hub names → shape of its weight."""
    attention = {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (KV_HEADS * HEAD, HIDDEN),
        "v_proj": (KV_HEADS * HEAD, HIDDEN),
    }
    attention |= {"o_proj": (HIDDEN, HIDDEN)}
    norms = {"q_norm": (HEAD,), "k_norm": (HEAD,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.{leaf}": shape for leaf, shape in attention.items()
    }
    shapes |= {f"{prefix}.self_attn.{leaf}": shape for leaf, shape in norms.items()}
    shapes |= {f"{prefix}.{leaf}": (HIDDEN,) for leaf in ("input_layernorm", "post_attention_layernorm")}
    shapes[f"{prefix}.mlp.gate"] = (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for leaf in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.mlp.experts.{expert}.{leaf}"] = (WIDTH, HIDDEN)
        shapes[f"{prefix}.mlp.experts.{expert}.down_proj"] = (HIDDEN, WIDTH)
    return shapes


def main() -> None:
    """The watched process: says that its imports are done, then calibrates."""
    model, data, run = sys.argv[1:]
    print(READY, flush=True)
    calibrate(
        CalibrateSettings(
            model=model, data=data, run=Path(run), samples=8, seq=128, batch=4, schedule="layerwise"
        ),
        Silent(),
    )


if __name__ == "__main__":
    main()
