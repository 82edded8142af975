"""Good checkpoints of tiny models, made once for a module."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.export.run import export
from stages.progress import Silent
from stages.settings import ExportSettings
from tests.stages.export import support

KV = "general/ptq/nvfp4_default-kv_fp8"
RECIPES = {"nvfp4": KV, "fp8": "fp8", "int8": "int8_smoothquant", "layers": "nvfp4"}
LAYERS = 11
WIDTH = 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with moe/, a mixture of experts with an MTP layer that no class builds, and layers/, a dense
    model of eleven layers with tied embeddings; each with its run beside it.
    """
    folder = tmp_path_factory.mktemp("sources")
    text = support.make_text(folder / "text.jsonl")
    support.make_model(folder / "moe", support.config_of("qwen3_moe"))
    weights = load_file(folder / "moe" / "model.safetensors")
    weights["mtp.fc.weight"] = torch.randn(WIDTH, 2 * WIDTH).to(torch.bfloat16)
    weights["mtp.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    save_file(weights, folder / "moe" / "model.safetensors", {"format": "pt"})
    tied = support.config_of("llama", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    support.make_model(folder / "layers", tied)
    for name in ("moe", "layers"):
        support.make_run(folder / f"{name}-run", folder / name, text, samples=8)
    return folder


@pytest.fixture(scope="module")
def good(sources: Path) -> Callable[[str], Path]:
    """Name of RECIPES → the checkpoint, exported when it is first asked for, in several shards; not to be
    written to.
    """

    def make(name: str) -> Path:
        out = sources / f"out-{name}"
        if not out.exists():
            run = sources / ("layers-run" if name == "layers" else "moe-run")
            settings = ExportSettings(run=run, out=out, recipe=RECIPES[name], shard_size=60_000)
            export(settings, Silent())
        return out

    return make
