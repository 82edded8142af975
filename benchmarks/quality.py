"""What quantizing costs in loss: exported checkpoints, dequantized, on windows that calibration never saw.

All in float32 arithmetic, so that only what the checkpoints hold differs. With quantized inputs as well
(W4A4), what reaches a quantized weight is rounded to NVFP4 under the checkpoint's own input scales.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from benchmarks.dequantize import weight_of
from benchmarks.models import Subject
from benchmarks.section import Section
from stages.calibrate.experts import GROUPED
from stages.calibrate.load import load_model
from stages.calibrate.run import calibrate
from stages.calibrate.solve.formats import NVFP4, block_amax, quantize, scales_from_amax
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings

RECIPES = {
    "round to nearest": "nvfp4",
    "AWQ lite": "nvfp4_awq_lite",
    "AWQ full": "nvfp4_awq_full",
    "GPTQ": "general/ptq/nvfp4_default-kv_none-gptq",
}
CPU = torch.device("cpu")
SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")


def measure_quality(subject: Subject, unseen: Path, scratch: Path) -> Section:
    """Loss of every recipe over the unquantized model's, with and without quantized inputs.

    unseen: JSON, a list of windows of token ids.
    """
    windows = torch.tensor(json.loads(unseen.read_text(encoding="utf-8")))
    run, checkpoint = scratch / "quality-run", scratch / "quality-checkpoint"
    write_dequantized(subject.model, checkpoint)
    base = losses(load_model(checkpoint, CPU, "grouped_mm"), windows)
    rows, figures = [], {"base": base.mean().item()}
    for name, recipe in RECIPES.items():
        settings = CalibrateSettings(
            model=str(subject.model),
            data=str(subject.data),
            run=run,
            recipe=recipe,
            samples=subject.samples,
            seq=subject.seq,
            batch=subject.batch,
            device="cpu",
        )
        calibrate(settings, Silent())
        out = scratch / f"quality-{recipe.rpartition('/')[2]}"
        export(ExportSettings(run=run, out=out, recipe=recipe), Silent())
        input_scales = write_dequantized(out, checkpoint)
        model = load_model(checkpoint, CPU, "grouped_mm")
        cells = [name]
        for kind, found in (
            ("W4A16", losses(model, windows)),
            ("W4A4", losses(model, windows, _by_weight(model, input_scales))),
        ):
            increase = found - base
            figures[f"{kind}/{name}"] = increase.mean().item()
            error = increase.std().item() / len(increase) ** 0.5
            ratio = figures[f"{kind}/{name}"] / figures[f"{kind}/round to nearest"]
            cells += [f"{increase.mean():+.4f} ± {error:.4f}", f"{ratio:.2f}"]
        rows.append(tuple(cells))
    return Section(
        title=f"6. Loss of {subject.name} in NVFP4 over {figures['base']:.4f} unquantized",
        columns=("weights alone", "of round to nearest", "weights and inputs", "of round to nearest"),
        rows=tuple(rows),
        notes=(f"{len(windows)} unseen windows of {windows.shape[1]} tokens; ± is one standard error.",),
        figures=figures,
    )


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
    return {module: tensors[f"{module}.input_scale"] for module in quantized}


@torch.inference_mode()
def losses(
    model: PreTrainedModel, windows: Tensor, input_scales: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Mean loss per token of each window: int64 [windows, seq] → f64 [windows]."""
    found = []
    for window in windows:
        with RoundInputs(input_scales or {}):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        found.append(nn.functional.cross_entropy(logits.double(), window[1:]))
    return torch.stack(found)


class RoundInputs(TorchFunctionMode):
    """Rounds what is multiplied with certain weights to NVFP4: storage of a weight → its input scale."""

    def __init__(self, scales: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.scales = scales

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.scales and (func is nn.functional.linear or getattr(func, "__name__", "") in GROUPED):
            scale = self.scales.get(args[1].untyped_storage().data_ptr())
            if scale is not None:
                args = (rounded(args[0], scale), *args[1:])
        return func(*args, **(kwargs or {}))


def rounded(inputs: Tensor, scale: Tensor) -> Tensor:
    """Inputs as NVFP4 holds them under a tensor-wide scale: f32 [..., channels]."""
    shared = scale.float().reshape(1, 1)
    rows = inputs.reshape(-1, inputs.shape[-1])
    blocks = scales_from_amax(NVFP4, block_amax(NVFP4, rows), shared)
    return quantize(NVFP4, rows, blocks, shared).dequantize().view_as(inputs)


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
