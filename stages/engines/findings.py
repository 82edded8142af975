"""What verify finds, under the names of its rules. The rules themselves are beside: see RULES for where."""

from dataclasses import dataclass
from pathlib import Path

RULES = {
    # files.py
    "files": "every file is whole, and the index names what the files hold, each tensor once",
    "stale-shard": "no safetensors file lies in the folder that is not read",
    "index-size": "the index adds up to the bytes of its tensors",
    "config": "config.json and hf_quant_config.json are there and say how weights are quantized",
    "config-disagree": "both configurations say the same",
    "config-groups": "config_groups and quantized_layers say the same as the rest",
    # layout.py, and verify/of_class.py
    "group-size": "block scales are of groups of the size that is said",
    "missing-tensor": "every tensor that an engine asks for is there",
    "extra-tensor": "no tensor is there that the format does not have",
    "dtype": "every tensor has the format's dtype",
    "shape": "every tensor has the shape that its weight and its format give it",
    "misfit": "every weight consists of whole blocks of its format, where engines take no others",
    "not-declared": "the format of every quantized module is said, and is known",
    "packed-and-plain": "no weight is there twice, quantized and plain or fused and apart",
    "fused-formats": "linears that engines fuse, and a layer's experts, are in one format",
    "kv-undeclared": "scales of KV caches are there only if the configuration says so",
    "kv-missing": "where the configuration says so, every attention has them",
    # judge.py
    "excluded-quantized": "the list of unquantized modules names no quantized one to an engine",
    "not-excluded": "the list names every unquantized module that engines build",
    "not-loaded": "the engine that was asked for loads such a checkpoint",
    # scalars.py, and verify/values.py
    "scale-value": "scales of whole tensors, rows and inputs are finite and above 0",
    "block-scale": "block scales are finite and not below 0, and 0 only where all their codes are",
    "fused-scales": "fused linears share the scales that an engine keeps one of",
    "code-nan": "no code stands for NaN",
    "not-finite": "plain tensors are finite",
    # verify/of_source.py
    "source-dropped": "every tensor of the source is there, as it is or quantized",
    "source-added": "no tensor is there that does not come from the source",
    "source-changed": "what is not quantized is the source's, bit for bit",
    "source-weights": "quantized weights are the source's, as near as their format comes",
    # verify/run.py, with --numeric
    "loss-increase": "the loss is no further from the source's than --max-loss-increase allows",
}
"""Rule → what holds where nothing is found."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. name: of the tensor, module or file. engines: those that it concerns; empty
    for all.
    """

    rule: str
    name: str
    says: str
    engines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.rule}: {self.name}: {self.says}"


def without_path(folder: Path, message: str) -> str:
    """A message without the folder's path: reports go where checkpoints go."""
    return message.replace(f"{folder}/", "").replace(str(folder), "the folder")
