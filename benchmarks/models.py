"""The models and texts that are measured: a trained test model where there is one, or random Qwen3-MoEs."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from pipeline.demo import collect_documents, make_demo, write_tokenizer
from stages.calibrate.forward.whole_model import load_model, load_tokenizer
from stages.calibrate.run import calibrate
from stages.calibrate.text.tokens import token_matrix
from stages.model.skeleton import Skeleton, load_config
from stages.progress import Silent
from stages.settings import CalibrateSettings
from state.source import Source

SHARD_SIZE = 100_000_000
"""Bytes per shard of the random models and of all exports: small enough that streaming shows in memory."""

OVERLAP = 16
"""Tokens that a window may not share in a row with the calibration text to be measured on."""

MORE_THAN_THE_TEXT = 1_000_000

FORWARD_SIZE = {
    "num_hidden_layers": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "vocab_size": 32_000,
}
"""0.9 B parameters, 1.8 GB: for a GPU."""

EXPORT_SIZE = FORWARD_SIZE | {"num_experts": 32, "moe_intermediate_size": 384, "vocab_size": 8_192}
"""0.34 B parameters, 0.7 GB: memory tells something, and two cores export it in seconds."""


@dataclass(frozen=True)
class Subject:
    """A model folder, a text, and how much of it is read: `samples` windows of `seq` tokens, `batch` per
    forward.
    """

    name: str
    model: Path
    data: Path
    samples: int
    seq: int
    batch: int

    def tokens(self) -> NDArray[np.int32]:
        """The token matrix, int32 [samples, seq]."""
        return token_matrix(
            load_tokenizer(self.model), str(self.data), samples=self.samples, seq=self.seq, progress=Silent()
        )

    def calibrated(self, run: Path, device: torch.device, recipe: str = "nvfp4") -> Path:
        """Calibrate it into `run`, and solve what a recipe needs."""
        settings = CalibrateSettings(
            model=str(self.model),
            data=str(self.data),
            run=run,
            samples=self.samples,
            seq=self.seq,
            batch=self.batch,
            device=str(device),
            commit_every=30.0,
            recipe=recipe,
        )
        calibrate(settings, Silent())
        return run

    @property
    def parameters(self) -> int:
        """How many values the model's tensors hold."""
        return sum(math.prod(entry.shape) for entry in Source.open(self.model).tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of the model's shards."""
        return sum(shard.stat().st_size for shard in self.model.glob("*.safetensors"))


def for_forward(scratch: Path, device: torch.device) -> Subject:
    """On a GPU the random model of FORWARD_SIZE; else the trained test model, or the demo's without one."""
    if device.type == "cuda":
        return random_moe(scratch / "forward", device, FORWARD_SIZE, samples=16, seq=2048)
    trained = trained_model()
    if trained is not None:
        return trained
    make_demo(scratch / "demo")
    return Subject("demo Qwen3-MoE", scratch / "demo/model", scratch / "demo/text.jsonl", 128, 256, 8)


def for_export(scratch: Path, device: torch.device, forward: Subject) -> list[Subject]:
    """On a GPU the forward part's model; else a random one of EXPORT_SIZE, and the trained one."""
    if device.type == "cuda":
        return [forward]
    trained = trained_model()
    large = random_moe(scratch / "export", device, EXPORT_SIZE, samples=8, seq=256)
    return [large] if trained is None else [large, trained]


def trained_model() -> Subject | None:
    """code-moe, 17.5 M parameters, from the folder that HOLDFAST_SHARED names."""
    shared = os.environ.get("HOLDFAST_SHARED")
    if not shared:
        return None
    return Subject(
        "code-moe", Path(shared) / "models/code-moe", Path(shared) / "data/code.jsonl", 128, 256, 8
    )


def clean_windows(trained: Subject) -> dict[str, NDArray[np.int32]]:
    """Windows to measure the trained model's loss on, int32 [windows, seq], by where they come from: other
    files, and the text behind the calibration windows. None shares a run of OVERLAP tokens with those.
    """
    unseen = json.loads((trained.data.parent / "unseen.json").read_text(encoding="utf-8"))
    text = replace(trained, samples=MORE_THAN_THE_TEXT).tokens()
    calibrated = {run for window in text[: trained.samples] for run in _runs(window)}
    return {
        name: np.stack([window for window in windows if calibrated.isdisjoint(_runs(window))])
        for name, windows in (
            ("other files", np.array(unseen, np.int32)),
            ("later text", text[trained.samples :]),
        )
    }


def _runs(window: NDArray[np.int32]) -> list[bytes]:
    """Every run of OVERLAP tokens in a window."""
    return [window[start : start + OVERLAP].tobytes() for start in range(len(window) - OVERLAP + 1)]


def random_moe(
    folder: Path, device: torch.device, size: Mapping[str, int], samples: int, seq: int
) -> Subject:
    """Save a random bf16 Qwen3-MoE in shards of SHARD_SIZE, with the demo's tokenizer and text."""
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        intermediate_size=2048,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        **size,
    )
    return random_model(folder, device, config, samples, seq)


def random_model(
    folder: Path, device: torch.device, config: PretrainedConfig, samples: int, seq: int
) -> Subject:
    """The same of any config."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder / "model", max_shard_size=SHARD_SIZE)
    documents = collect_documents()
    write_tokenizer(folder / "model", documents)
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    name = f"random {config.model_type} of {parameters / 1e9:.2f} B parameters"
    return Subject(name, folder / "model", folder / "text.jsonl", samples, seq, batch=8)


def load_whole(folder: Path, device: torch.device, experts: str) -> PreTrainedModel:
    """The model in a folder as calibration loads it."""
    source = Source.open(folder)
    return load_model(Skeleton(load_config(folder), source.tensors), source, device, experts)
