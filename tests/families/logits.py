"""Logits of an export's weights, put back into transformers' class in float32."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.families.checkpoint import Checkpoint
from tests.families.expected import joined, matrices
from tests.families.layout import Family
from tests.families.replay import load

QUANTIZED = (torch.uint8, torch.float8_e4m3fn)

Weights = dict[str, torch.Tensor]


def write_plain(family: Family, source: Path, weights: Weights, folder: Path) -> None:
    """A folder of the hub's layout with these weights, and with no quantization in its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def dequantized(family: Family, weights: Weights, export: Checkpoint) -> Weights:
    """The export's weights under the hub's names, float32, experts fused again."""
    found = {}
    for name, parts in matrices(family, weights).items():
        if name in export.tensors and export.tensors[name].dtype not in QUANTIZED:
            found[name] = export.tensors[name].float()
            continue
        values = {}
        for matrix in parts:
            values[matrix.module] = export.values(matrix.module, matrix.transposed)
        if name in family.layout.fused:
            fused = family.layout.fused[name]
            found[name] = joined(name, values, fused, weights[name].shape[0])
        else:
            (found[name],) = values.values()
    return {name: found[name] if name in found else export.tensors[name].float() for name in weights}


def logits(family: Family, folder: Path, windows: torch.Tensor) -> torch.Tensor:
    """float32 logits of the windows."""
    model = load(family, folder, torch.float32)
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=windows, use_cache=False).logits.float()
    return result


def distance(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far logits lie from others, as a part of their spread."""
    centred = wanted - wanted.mean(-1, keepdim=True)
    other = logits - logits.mean(-1, keepdim=True)
    return float((other - centred).norm() / centred.norm())
