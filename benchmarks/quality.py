"""What quantizing costs: exported checkpoints, dequantized, on windows that calibration never saw. By the
loss over the unquantized model's, and by the distance of what is predicted, KL(unquantized ‖ quantized).

The loss says what is lost on this text, and moves by chance; the distance moves less, and no flattened
distribution looks better by it, as may happen with the loss of a model that is too sure of itself.

All in float32 arithmetic, so that only what the checkpoints hold differs. With quantized inputs as well
(W4A4), what reaches a quantized weight is rounded to NVFP4 under the checkpoint's own input scales.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.dequantize import weight_of
from benchmarks.models import Subject, clean_windows, load_whole
from benchmarks.section import Section
from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.measure.rounding import Rounded, nvfp4
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from stages.solve import rounding

RECIPES = {
    "round to nearest": "nvfp4",
    "AWQ lite": "nvfp4_awq_lite",
    "AWQ full": "nvfp4_awq_full",
    "local Hessian": "nvfp4_w4a4_weight_local_hessian",
    "GPTQ": "general/ptq/nvfp4_default-kv_none-gptq",
    "tuned": "nvfp4_tuned",
    "tuned for W4A16": "w4a16_nvfp4_tuned",
}
SEEDS = (0, 1, 2)
"""Of the order of steps; another one moves a tuned model's loss by more than its windows' standard error."""
KINDS = ("W4A16", "W4A4")
CPU = torch.device("cpu")
TOGETHER = 4  # windows per forward
SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class Cost:
    """Means per token of each window, f64 [windows].

    loss: of the next token. distance: KL(unquantized ‖ quantized). spread: of their means over several seeds,
    the largest less the smallest.
    """

    loss: Tensor
    distance: Tensor
    spread: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def mean(cls, seeds: Sequence["Cost"]) -> "Cost":
        """Of the same windows under several seeds."""
        loss = torch.stack([seed.loss for seed in seeds])
        distance = torch.stack([seed.distance for seed in seeds])
        spread = (_range(loss), _range(distance))
        return cls(loss.mean(0), distance.mean(0), spread)


def measure_quality(subject: Subject, scratch: Path) -> Iterator[Section]:
    """What every recipe costs, with and without quantized inputs: on the clean windows of other files, and on
    all.
    """
    windows = clean_windows(subject)
    every = torch.from_numpy(np.concatenate(list(windows.values())).astype(np.int64))
    base, found = _costs_of_recipes(subject, every, scratch)
    alone = len(windows["other files"])
    yield _section(subject, f"{alone} windows of other files", base, found, slice(alone))
    yield _section(subject, f"all {len(every)} clean windows", base, found, slice(None))


def _costs_of_recipes(
    subject: Subject, windows: Tensor, scratch: Path
) -> tuple[Tensor, dict[tuple[str, str], Cost]]:
    """Losses of the unquantized model, f64 [windows]; costs by kind and name of every recipe."""
    checkpoint = scratch / "quality-checkpoint"
    write_dequantized(subject.model, checkpoint)
    unquantized = list(predictions(load_whole(checkpoint, CPU, "grouped_mm"), windows))
    found: dict[tuple[str, str], Cost] = {}
    for name, recipe in RECIPES.items():
        seeds = SEEDS if "tuned" in recipe else SEEDS[:1]
        costs = [_costs_of_seed(subject, scratch, recipe, seed, windows, unquantized) for seed in seeds]
        for kind in costs[0]:
            found[kind, name] = Cost.mean([own[kind] for own in costs])
    return cost(unquantized, windows, unquantized).loss, found


def _costs_of_seed(
    subject: Subject, scratch: Path, recipe: str, seed: int, windows: Tensor, unquantized: Sequence[Tensor]
) -> dict[str, Cost]:
    """Costs by kind of what one recipe exports; W4A4 where it stores scales of inputs."""
    settings = CalibrateSettings(
        model=str(subject.model),
        data=str(subject.data),
        run=scratch / f"quality-run-{seed}",
        recipe=recipe,
        samples=subject.samples,
        seq=subject.seq,
        batch=subject.batch,
        device="cpu",
    )
    out, checkpoint = scratch / f"quality-{recipe.rpartition('/')[2]}-{seed}", scratch / "quality-checkpoint"
    with patch.object(rounding, "SEED", seed):
        calibrate(settings, Silent())
    export(ExportSettings(run=settings.run, out=out, recipe=recipe), Silent())
    input_scales = write_dequantized(out, checkpoint)
    model = load_whole(checkpoint, CPU, "grouped_mm")
    kinds = {"W4A16": {}, "W4A4": _by_weight(model, input_scales)} if input_scales else {"W4A16": {}}
    return {
        kind: cost(predictions(model, windows, scales), windows, unquantized)
        for kind, scales in kinds.items()
    }


def _section(
    subject: Subject, windows: str, base: Tensor, found: Mapping[tuple[str, str], Cost], part: slice
) -> Section:
    rows, figures, seeds = [], {"base": base[part].mean().item()}, list[str]()
    for name in RECIPES:
        cells = [name]
        for kind in KINDS:
            if (kind, name) not in found:
                cells += ["-"] * 3
                continue
            increase, distance = (found[kind, name].loss - base)[part], found[kind, name].distance[part]
            figures[f"{kind}/{name}"] = increase.mean().item()
            figures[f"{kind}/{name}/KL"] = distance.mean().item()
            ratio = figures[f"{kind}/{name}"] / figures[f"{kind}/round to nearest"]
            cells += [f"{increase.mean():+.4f} ± {_error(increase):.4f}", f"{ratio:.2f}"]
            cells += [f"{distance.mean():.4f} ± {_error(distance):.4f}"]
            loss, kl = found[kind, name].spread
            if kl:
                seeds.append(f"{name}, {kind}: loss {loss:.4f}, KL {kl:.4f}")
        rows.append(tuple(cells))
    return Section(
        title=f"6. Loss of {subject.name} in NVFP4 over {figures['base']:.4f} unquantized, {windows}",
        columns=("weights alone", "of nearest", "KL", "weights and inputs", "of nearest", "KL"),
        rows=tuple(rows),
        notes=(
            f"Windows of {subject.seq} tokens that calibration never saw; ± is one standard error, as if",
            "they were independent of one another. KL(unquantized ‖ quantized) in nats per token.",
            f"Tuned: means of {len(SEEDS)} seeds, whose means of all windows lie apart by",
            *seeds,
        ),
        figures=figures,
    )


def _range(values: Tensor) -> float:
    """Largest less smallest mean of f64 [seeds, windows]."""
    means = values.mean(1)
    return float(means.max() - means.min())


def _error(values: Tensor) -> float:
    """One standard error of the mean of f64 [windows]."""
    return values.std().item() / len(values) ** 0.5


def write_dequantized(checkpoint: Path, out: Path) -> dict[str, Tensor]:
    """Write a checkpoint in float32, quantized weights as an engine computes with them. Returns the input
    scale of each module that has one.
    """
    tensors: dict[str, Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
    quantized = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    kept = {
        name: values.float()
        for name, values in tensors.items()
        if name.rpartition(".")[2] not in SCALES and name.removesuffix(".weight") not in quantized
    }
    weights = {f"{module}.weight": weight_of(tensors, module).contiguous() for module in quantized}
    out.mkdir(exist_ok=True)
    save_file(kept | weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    names = {module: f"{module}.input_scale" for module in quantized}
    return {module: tensors[name] for module, name in names.items() if name in tensors}


@torch.inference_mode()
def predictions(
    model: PreTrainedModel, windows: Tensor, input_scales: Mapping[int, Tensor] | None = None
) -> Iterator[Tensor]:
    """Log-probabilities of every next token, TOGETHER windows at a time: f32 [windows, seq - 1, vocabulary].

    windows: int64 [windows, seq]. input_scales: storage of a weight → its input scale, for NVFP4.
    """
    rounds = {storage: partial(nvfp4, scale=scale) for storage, scale in (input_scales or {}).items()}
    for batch in windows.split(TOGETHER):
        with Rounded(rounds, None, None):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        yield logits.log_softmax(-1)


def cost(predicted: Iterable[Tensor], windows: Tensor, unquantized: Sequence[Tensor]) -> Cost:
    """What predictions cost beside the unquantized model's, both as `predictions` gives them."""
    losses, distances = [], []
    for found, base, batch in zip(predicted, unquantized, windows.split(TOGETHER), strict=True):
        losses.append(-found.gather(-1, batch[:, 1:, None]).double().mean((1, 2)))
        distances.append((base.exp() * (base - found)).double().sum(-1).mean(1))
    return Cost(torch.cat(losses), torch.cat(distances))


def _by_weight(model: PreTrainedModel, scales: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Input scales by the storage of the weight in memory, of a model of fused experts."""
    found = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        module = module.replace("experts.gate_up_proj", "experts.0.gate_proj")
        module = module.replace("experts.down_proj", "experts.0.down_proj")
        if module in scales:
            found[parameter.untyped_storage().data_ptr()] = scales[module]
    return found
