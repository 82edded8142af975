"""The quantizer plan: what a recipe does to a model, as plain data in hub names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.formats import WeightFormat
from stages.recipe.recipes import Recipe

KvFormat = Literal["fp8", "fp8_cast", "nvfp4", "nvfp4_cast"]
CASTS: frozenset[KvFormat] = frozenset({"fp8_cast", "nvfp4_cast"})
"""Caches whose scale the recipe fixes at one."""


MOST_TOLD = 3


def told_left_out(left_out: Mapping[str, str]) -> list[str]:
    """A line for the screen for each reason why modules of a recipe stay as they are, with some of them."""
    by_reason: dict[str, list[str]] = {}
    for module, why in left_out.items():
        by_reason.setdefault(why, []).append(module)
    return [
        f"not quantized: {', '.join(modules[:MOST_TOLD])}"
        + (f" and {len(modules) - MOST_TOLD} more" if len(modules) > MOST_TOLD else "")
        + f" ({why})"
        for why, modules in by_reason.items()
    ]


@dataclass(frozen=True)
class QuantizerPlan:
    """What a recipe does to a model, in hub names.

    weights: linear or expert projection → its format. inputs: the same modules where the input is quantized
    too → the name of modelopt's quantizer. constant_inputs: those whose amax the recipe fixes. kv: attention
    module → KV cache format. fused_experts: expert
    projections that share one quantizer per layer. together: those that the checkpoint goes on holding in one
    tensor → its name. merged: linears that are one in the model class, with one quantizer → its name there.
    hf_quant_config: what modelopt writes to `hf_quant_config.json`, names mapped to the hub's. left_out:
    module or quantizer that the recipe names and that stays as it is → the reason.
    """

    recipe: Recipe
    weights: dict[str, WeightFormat] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    constant_inputs: dict[str, float] = field(default_factory=dict)
    kv: dict[str, KvFormat] = field(default_factory=dict)
    fused_experts: frozenset[str] = frozenset()
    together: dict[str, str] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    hf_quant_config: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def output(self, module: str, leaf: str) -> str:
        """The tensor that the checkpoint holds for a module under `weight`, `weight_scale` and so on;
        experts that stay together have one in common.
        """
        tensor = self.together.get(module)
        if tensor is None:
            return f"{module}.{leaf}"
        return tensor if leaf == "weight" else f"{tensor}_{leaf}"
