"""A checkpoint that can be damaged: all of it in memory, written anew without Holdfast's own records."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.progress import Silent
from stages.settings import VerifySettings
from stages.verify.report import VerifyReport
from stages.verify.run import verify

INDEX = "model.safetensors.index.json"
RECORDS = ("holdfast_export.json", "holdfast_journal.jsonl", "export_report.json", "verify_report.json")


@dataclass
class Editable:
    """tensors: by name. file_of: tensor → shard; tensors that are in none go to the first. config, own: the
    content of config.json and hf_quant_config.json.
    """

    tensors: dict[str, torch.Tensor]
    file_of: dict[str, str]
    config: dict[str, Any]
    own: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Editable":
        tensors, file_of = {}, {}
        for path in sorted(folder.glob("*.safetensors")):
            found = load_file(path)
            tensors |= found
            file_of |= dict.fromkeys(found, path.name)
        config, own = (
            json.loads((folder / name).read_text()) for name in ("config.json", "hf_quant_config.json")
        )
        return cls(tensors, file_of, config, own)

    @staticmethod
    def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
        """Every tensor of a folder, by name."""
        return {
            name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()
        }

    def write(self, folder: Path) -> None:
        """Every shard, the index where there are several shards, and both configurations."""
        files: dict[str, dict[str, torch.Tensor]] = {}
        first = min(self.file_of.values())
        for name, tensor in self.tensors.items():
            files.setdefault(self.file_of.get(name, first), {})[name] = tensor.contiguous().clone()
        for file, content in files.items():
            save_file(content, folder / file, {"format": "pt"})
        if len(files) > 1:
            weight_map = {name: file for file, content in files.items() for name in content}
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(content))
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "hf_quant_config.json").write_text(json.dumps(self.own))

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def separate(self) -> dict[str, Any]:
        """`quantization` of hf_quant_config.json."""
        found: dict[str, Any] = self.own["quantization"]
        return found

    def rename(self, old: str, new: str) -> None:
        """Give every tensor of a module to another one, and the other one's to it."""
        renamed = {}
        for name, tensor in self.tensors.items():
            for one, other in ((old, new), (new, old)):
                if name.startswith(f"{one}."):
                    name = other + name.removeprefix(one)
                    break
            renamed[name] = tensor
        self.tensors = renamed

    def drop(self, prefix: str) -> None:
        """Remove the tensors whose names begin so; at least one does."""
        gone = [name for name in self.tensors if name.startswith(prefix)]
        assert gone, prefix
        for name in gone:
            del self.tensors[name]

    def ignore(self, change: Callable[[list[str]], list[str]]) -> None:
        """Change the list of unquantized modules in both configurations."""
        self.quantization["ignore"] = change(self.quantization["ignore"])
        self.separate["exclude_modules"] = change(self.separate["exclude_modules"])


def damaged(good: Path, out: Path, edit: Callable[[Editable], None]) -> Path:
    """A copy of a checkpoint, edited, with its shards written anew."""
    copied(good, out)
    content = Editable.read(out)
    edit(content)
    for path in [*out.glob("*.safetensors"), out / INDEX]:
        path.unlink(missing_ok=True)
    content.write(out)
    return out


def copied(good: Path, out: Path) -> Path:
    """A copy without our own records."""
    shutil.copytree(good, out, ignore=shutil.ignore_patterns(*RECORDS))
    return out


def verified(out: Path, **settings: Any) -> VerifyReport:
    """The report of a checkpoint."""
    return verify(VerifySettings(out=out, **settings), Silent())
