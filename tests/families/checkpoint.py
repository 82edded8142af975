"""Reads an exported folder by the formats' definitions, with safetensors and torch alone."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
SCALES = ("weight_scale", "weight_scale_2", "input_scale")


@dataclass
class Checkpoint:
    """An export: its tensors, its two configurations and the names of all its files."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    exclude: list[str]
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read every shard and both configurations."""
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        config = json.loads((folder / "config.json").read_text())
        quantization = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
        return cls(folder, tensors, config, quantization["exclude_modules"])

    def weight_name(self, module: str) -> str | None:
        """The tensor that holds a module's weight; experts that stay fused have no `.weight` behind the
        name."""
        for name in (f"{module}.weight", module):
            if name in self.tensors:
                return name
        return None

    def scale(self, module: str, which: str) -> torch.Tensor | None:
        """A scale of a module, or None; the name counts as used."""
        for name in (f"{module}.{which}", f"{module}_{which}"):
            if name in self.tensors:
                self.used.add(name)
                return self.tensors[name]
        return None

    def quantized(self, module: str) -> bool:
        """Whether the weight lies in a quantized format."""
        name = self.weight_name(module)
        return name is not None and self.tensors[name].dtype in (torch.uint8, torch.float8_e4m3fn)

    def values(self, module: str, transposed: bool = False) -> torch.Tensor:
        """A module's weight as an engine would use it, float32 [.., out, in]. `transposed`: codes and block
        scales lie as [.., in, out] in the file."""
        name = self.weight_name(module)
        assert name is not None
        self.used.add(name)
        stored = self.tensors[name]
        scale = self.scale(module, "weight_scale")
        if transposed:
            stored = stored.mT
            scale = scale.mT if scale is not None and scale.ndim > 1 else scale
        if stored.dtype == torch.uint8:
            second = self.scale(module, "weight_scale_2")
            assert scale is not None and second is not None, f"{module} lacks a scale"
            return nvfp4(stored, scale, second)
        if stored.dtype == torch.float8_e4m3fn:
            assert scale is not None, f"{module} lacks its scale"
            return stored.float() * scale.float()
        return stored.float()


def nvfp4(packed: torch.Tensor, scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """e2m1 codes, the even column in the low nibble, times a scale per 16 columns, times one for the
    tensor."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    blocks = FP4[codes].reshape(*scale.shape, 16)
    return (blocks * scale.float()[..., None]).flatten(-2) * second.float().reshape(
        -1, *(1,) * (packed.ndim - 1)
    )
