"""Whether tuned rounding holds on text that it never saw: the error at each layer's output, before and after.

Small models, a dense and a hybrid one, are trained first, in a minute or two on two cores: layers of random
weights have nothing to be fitted to. The held-out windows go through both streams beside the others, behind
them, and neither GPTQ nor tuning is given them.
"""

import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, NemotronHConfig, PretrainedConfig

from benchmarks.models import Subject
from benchmarks.section import Section
from pipeline.demo import CONFIG, write_tokenizer
from stages.calibrate import one_pass
from stages.calibrate.forward.buffers import HIDDEN
from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.observe.second_moments import Moments
from stages.calibrate.run import calibrate
from stages.calibrate.schedule import solving
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.calibrate.schedule.quantized_stream import QuantizedStream
from stages.calibrate.schedule.tuning import Tuned, tune
from stages.formats.quantized import Quantized
from stages.progress import Silent
from stages.settings import CalibrateSettings
from stages.solve.more_windows import more_windows
from stages.solve.rounding import token_errors, token_weights

STEPS, TOGETHER, WINDOW = 300, 16, 128
"""Of training: steps, windows of a step, tokens of a window."""
BATCH, SEQ, SAMPLES, HELD_OUT = 8, 256, 64, 64
"""Windows of a forward, tokens of each, how many calibrate and how many are held out."""


def configs() -> dict[str, PretrainedConfig]:
    """About two million parameters each."""
    shared: dict[str, Any] = {
        "vocab_size": CONFIG["vocab_size"],
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return {
        "dense (Llama)": LlamaConfig(
            architectures=["LlamaForCausalLM"], num_hidden_layers=4, intermediate_size=512, **shared
        ),
        "hybrid (Nemotron-H)": NemotronHConfig(
            architectures=["NemotronHForCausalLM"],
            layers_block_type=["mamba", "mlp", "attention", "mlp"],
            intermediate_size=512,
            mamba_num_heads=6,
            mamba_head_dim=64,
            ssm_state_size=32,
            n_groups=1,
            chunk_size=64,
            use_mamba_kernels=False,
            **shared,
        ),
    }


@dataclass
class Errors:
    """Weighted mean squared error on held-out windows, by layer: of GPTQ's weights and of tuned ones."""

    before: dict[int, float] = field(default_factory=dict)
    after: dict[int, float] = field(default_factory=dict)


def measure_held_out(scratch: Path) -> Section:
    """Error of every layer of the trained models, and its change."""
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    for name, config in configs().items():
        subject, loss = trained(scratch / name.partition(" ")[0], config)
        errors = held_out_errors(subject, scratch / f"run-{name.partition(' ')[0]}")
        ratios = [errors.after[layer] / errors.before[layer] for layer in errors.before]
        for layer, ratio in zip(errors.before, ratios, strict=True):
            before, after = errors.before[layer], errors.after[layer]
            rows.append((f"{name}, layer {layer}", f"{before:.5f}", f"{after:.5f}", f"{ratio - 1:+.1%}"))
        mean = float(np.mean(ratios))
        rows.append((f"{name}, mean (loss of training {loss:.2f})", "", "", f"{mean - 1:+.1%}"))
        figures[name] = mean
    return Section(
        title="9. Error of a layer's output on text that was not calibrated with, NVFP4",
        columns=("GPTQ", "tuned", "change"),
        rows=tuple(rows),
        notes=(
            "Squared error over the mean square of each token, both behind the same quantized layers,",
            "inputs rounded.",
        ),
        figures=figures,
    )


def trained(folder: Path, config: PretrainedConfig) -> tuple[Subject, float]:
    """A model trained on the standard library's sources, and its last loss."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    (folder / "model").mkdir(parents=True)
    write_tokenizer(folder / "model", documents)
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    subject = Subject(folder.name, folder / "model", folder / "text.jsonl", SAMPLES, SEQ, BATCH)
    config.save_pretrained(folder / "model")
    windows = replace(subject, samples=40_000, seq=WINDOW).tokens().astype(np.int64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    loss = _train(model, torch.from_numpy(windows))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    return subject, loss


def _train(model: nn.Module, windows: Tensor) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    random = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (TOGETHER,), generator=random)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss.item())


def held_out_errors(subject: Subject, run: Path) -> Errors:
    """Errors of a calibration with `nvfp4_tuned`, on windows behind those that calibrate."""
    later = replace(subject, samples=SAMPLES + 1 + HELD_OUT).tokens()[-HELD_OUT:]
    errors = Errors()
    settings = CalibrateSettings(
        model=str(subject.model),
        data=str(subject.data),
        run=run,
        recipe="nvfp4_tuned",
        samples=SAMPLES,
        seq=SEQ,
        batch=BATCH,
        device="cpu",
        schedule="layerwise",
    )
    with watching(errors, later):
        calibrate(settings, Silent())
    return errors


@contextmanager
def watching(errors: Errors, later: NDArray[np.int32]) -> Iterator[None]:
    """Within the context the last batches are held out, and every tuned layer is measured on them."""
    held_out = len(later) // BATCH

    def with_later(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        more = more_windows(tokens)
        return np.concatenate([more[: len(more) // BATCH * BATCH], later])

    class Without(QuantizedStream):
        def collect(self, step: LayerStep, moments: Moments) -> None:
            super().collect(_shortened(step, held_out), moments)

    def measured(
        step: LayerStep, stream: QuantizedStream, solved: dict[str, tuple[Quantized, Tensor]]
    ) -> Tuned:
        before = {name: quantized for name, (quantized, _) in solved.items()}
        tuned = tune(_shortened(step, held_out), stream, solved)
        errors.before[step.layer] = _error(step, stream, before, held_out)
        errors.after[step.layer] = _error(step, stream, tuned.found, held_out)
        return tuned

    changes: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (one_pass, "more_windows", with_later),
        (one_pass, "QuantizedStream", Without),
        (solving, "tune", measured),
    )
    with patch.object(*changes[0]), patch.object(*changes[1]), patch.object(*changes[2]):
        yield


def _shortened(step: LayerStep, held_out: int) -> LayerStep:
    """The step with its last batches out of sight."""
    assert step.replay is not None
    return replace(step, replay=replace(step.replay, batches=step.replay.batches - held_out))


@torch.inference_mode()
def _error(step: LayerStep, stream: QuantizedStream, found: Mapping[str, Quantized], held_out: int) -> float:
    """Mean over the held-out tokens."""
    replay = step.replay
    assert replay is not None
    dtype = next(step.module.parameters()).dtype
    weights = {name: quantized.dequantize().to(dtype) for name, quantized in found.items()}
    layer = LayerMatrices(stream.skeleton, stream.quantizers.weights, step.layer).replaced(step.name, weights)
    errors = []
    with stream.rounded(step):
        for batch in range(replay.batches - held_out, replay.batches):
            target = replay.target(batch)
            errors.append(token_errors(replay.run(batch, layer)[HIDDEN], target) * token_weights(target))
    return float(torch.cat(errors).mean())
