"""Writes a family's folder as the hub would hold it, from its specification alone."""

import fnmatch
import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.families.layout import Family, Tensor
from tests.families.quantized import Stored, store
from tests.families.tokenizer import write_tokenizer

Weights = dict[str, torch.Tensor]

LOUD_FROM, LOUD_EVERY, LOUDER = 48, 13, 4.0
"""Norms at least that wide lift every 13th channel, as real ones lift a few: AWQ then has something to
scale."""


def write_family(family: Family, folder: Path) -> Weights:
    """Write model.safetensors, config.json, the tokenizer and the family's further files into the folder.

    Returns the weights by hub name as calibration should see them: those that lie quantized in the file are
    dequantized to bfloat16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored, weights = contents(family)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    for name, text in family.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(family.config, indent=2) + "\n", encoding="utf-8")
    return weights


def contents(family: Family) -> tuple[Weights, Weights]:
    """What the file holds, and what it means."""
    stored: Weights = {}
    meant: Weights = {}
    for name, tensor in family.layout.tensors.items():
        value = make_value(name, tensor)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in family.quantized):
            lying: Stored = store(family.stored, name, value)
            stored |= lying.tensors
            meant[name] = lying.meaning
        else:
            stored[name] = meant[name] = value
    return stored, meant


def make_value(name: str, tensor: Tensor) -> torch.Tensor:
    """Random values that the name alone decides, so that two folders agree on a tensor they share. Matrices
    keep the variance of their input; norms and vectors lie around the value that the specification gives, but
    for a few loud channels."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.kind in ("norm", "vector"):
        value = tensor.around + (0.1 if tensor.kind == "norm" else 0.05) * noise
        if tensor.kind == "norm" and len(value) >= LOUD_FROM:
            value[zlib.crc32(name.encode()) % LOUD_EVERY :: LOUD_EVERY] += LOUDER
    elif tensor.kind == "embedding":
        value = noise
    else:
        value = noise * (tensor.shape[-1] if tensor.kind == "linear" else tensor.shape[1]) ** -0.5
    return value.to(getattr(torch, tensor.dtype))
