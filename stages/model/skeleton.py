"""The model without its weights: built on the meta device, with every module named as the hub names it.

Hub names (`model.layers.3.mlp.experts.17.up_proj`) are what engines read and what this project stores. Memory
names are where transformers keeps the same weights, possibly fused
(`model.layers.3.mlp.experts.gate_up_proj`). The map runs forward, from hub tensor to parameter, through
transformers' own conversion rules; a reverse map would have to guess.

`core_model_loading` and `conversion_mapping` are semi-private in transformers; docs/versions.md has what ran.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from stages.model.dequantize.stated import without_quantization
from stages.model.matrices import StoredMatrix
from stages.model.plausible import read_config
from state.errors import InputError
from state.reasons import reason
from state.source import weights_file


@dataclass(frozen=True)
class LinearModule:
    """An `nn.Linear`, or a router with a weight of its own: y = x Wᵀ with W of shape [out_features,
    in_features].
    """

    hub: str
    memory: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ExpertsModule:
    """A module that holds all experts of one layer as three-dimensional parameters.

    up: hub leaves whose weights make up the first projection, in the order they are stacked (`gate_proj`,
    `up_proj`). down: hub leaf of the second projection. fused_on_hub: the hub stores them fused as well,
    instead of expert by expert.
    """

    hub: str
    memory: str
    count: int
    up: tuple[str, ...]
    down: str
    up_parameter: str
    hidden: int
    intermediate: int
    fused_on_hub: bool

    def projections(self, expert: int) -> list[str]:
        """Hub names of one expert's projections, first projection before second."""
        return [f"{self.hub}.{expert}.{leaf}" for leaf in (*self.up, self.down)]


def load_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration. Raises InputError when it is missing, unreadable or of an unknown kind."""
    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # the class of a model computes with what it finds, and raises what comes of it
        raise InputError(
            f"{folder}/config.json can't be used: {type(error).__name__}: {reason(error)}"
        ) from error


def refuse_other_weights(config: PretrainedConfig, folder: Path) -> None:
    """Raise InputError where the configuration has transformers take the weights from another file than the
    one that is read and digested here.
    """
    for part in (config, config.get_text_config()):
        named = getattr(part, "transformers_weights", None)
        if named not in (None, weights_file(folder)):
            raise InputError(
                f"{folder}/config.json takes the weights from {named!r} (transformers_weights), and Holdfast "
                f"reads {weights_file(folder)}; remove transformers_weights, or give a folder that holds the "
                "wanted file under that name"
            )


class Skeleton:
    """A model on the meta device and the names of its parts.

    Args:
        config: the model's configuration; it is copied, since building a model writes to it, without what it
            says of quantization: the tensors are plain (stages/model/dequantize).
        tensor_names: every tensor name of the hub checkpoint.
    Raises InputError when transformers can't build a causal language model from the configuration.
    """

    def __init__(
        self, config: PretrainedConfig, tensor_names: Iterable[str], trust_remote_code: bool = False
    ) -> None:
        self.config = type(config).from_dict(without_quantization(config.to_dict()))
        self.model = build_meta_model(self.config, trust_remote_code)
        self.parameter_of = map_tensors(self.model, tensor_names)

    @cached_property
    def hub_of(self) -> dict[str, str]:
        """Memory name → hub name, for every module that owns a weight the hub stores under one name of its
        own.
        """
        owners = {}
        for tensor, (parameter, _) in self.parameter_of.items():
            hub, _, leaf = tensor.rpartition(".")
            memory, _, memory_leaf = parameter.rpartition(".")
            if leaf == memory_leaf:
                owners[memory] = hub
        return owners

    def hub_name(self, memory: str) -> str:
        """Hub name of any module: its own, or its nearest named descendant's with the same tail taken off."""
        if memory in self.hub_of:
            return self.hub_of[memory]
        for child, hub in self.hub_of.items():
            tail = child.removeprefix(memory)
            if child != memory and child.startswith(memory + ".") and hub.endswith(tail):
                return hub.removesuffix(tail)
        return memory

    @cached_property
    def linears(self) -> list[LinearModule]:
        """Every linear and router, in the model's own order."""
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) or is_router(module):
                rows, columns = module.weight.shape
                found.append(LinearModule(self.hub_name(name), name, columns, rows))
        return found

    @cached_property
    def experts(self) -> list[ExpertsModule]:
        """Every module of fused experts that transformers dispatches through its experts registry.

        Raises InputError for three-dimensional expert weights outside that registry, which could not be
        observed.
        """
        found = []
        for name, module in self.model.named_modules():
            if is_registry_experts(module):
                found.append(self._experts_module(name, module))
            elif (
                any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
                and "expert" in name
            ):
                raise InputError(
                    f"{name} ({type(module).__name__}) keeps its experts fused outside transformers' experts "
                    "registry; such models are not supported yet (supported: fused experts in the registry, "
                    "experts as nn.Linear)"
                )
        return found

    def matrix(self, module: str) -> StoredMatrix:
        """Where the checkpoint keeps the weight of a linear, router or expert projection, by hub name."""
        return StoredMatrix(f"{module}.weight")

    def projections(self) -> list[str]:
        """Hub names of all that has a weight: linears, routers and each expert's projections."""
        names = [linear.hub for linear in self.linears]
        for experts in self.experts:
            for number in range(experts.count):
                names += experts.projections(number)
        return names

    def _experts_module(self, memory: str, module: Any) -> ExpertsModule:
        up_parameter = "gate_up_proj" if module.has_gate else "up_proj"
        up = getattr(module, up_parameter)
        hidden, width = (up.shape[1], up.shape[2]) if module.is_transposed else (up.shape[2], up.shape[1])
        first = self._expert_leaves(f"{memory}.{up_parameter}")
        second = self._expert_leaves(f"{memory}.down_proj")
        fused_on_hub = not first
        if fused_on_hub:
            hub = self._fused_hub_name(f"{memory}.{up_parameter}", memory)
            first, second = {"gate_proj": hub, "up_proj": hub}, {"down_proj": hub}
            if not module.has_gate:
                first = {"up_proj": hub}
        return ExpertsModule(
            hub=next(iter(first.values())),
            memory=memory,
            count=up.shape[0],
            up=tuple(first),
            down=next(iter(second)),
            up_parameter=up_parameter,
            hidden=hidden,
            intermediate=width // (2 if module.has_gate else 1),
            fused_on_hub=fused_on_hub,
        )

    def _expert_leaves(self, parameter: str) -> dict[str, str]:
        """Leaves (`gate_proj`) of the per-expert hub tensors that feed a fused parameter → hub name of the
        experts.
        """
        leaves: dict[str, tuple[int, str]] = {}
        for tensor, (target, order) in self.parameter_of.items():
            if target != parameter or not tensor.endswith(".weight"):
                continue
            module, _, leaf = tensor.removesuffix(".weight").rpartition(".")
            experts, _, number = module.rpartition(".")
            if number.isdigit():
                leaves[leaf] = (order, experts)
        return {leaf: hub for leaf, (_, hub) in sorted(leaves.items(), key=lambda item: item[1][0])}

    def _fused_hub_name(self, parameter: str, memory: str) -> str:
        for tensor, (target, _) in self.parameter_of.items():
            if target == parameter:
                return tensor.removesuffix(".weight").rpartition(".")[0]
        return memory


def is_router(module: nn.Module) -> bool:
    """True for routers that multiply with a two-dimensional weight without being an `nn.Linear` (Qwen3-MoE's
    TopKRouter).
    """
    kind = type(module).__name__.lower()
    weight = module._parameters.get("weight")
    return ("router" in kind or "gate" in kind) and weight is not None and weight.dim() == 2


def is_registry_experts(module: nn.Module) -> bool:
    """True for expert modules whose class carries transformers' `use_experts_implementation` decorator."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def build_meta_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of `config` on the meta device. Raises InputError where that is
    impossible.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the configuration
        raise InputError(
            "no causal language model can be built from this config.json: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    return model.eval()


def map_tensors(model: PreTrainedModel, tensor_names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Hub tensor → (parameter it feeds, its place among that parameter's sources)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    meta_state = model.state_dict()
    targets = {}
    for name in sorted(tensor_names):
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, meta_state
        )
        order = next(
            (c.source_patterns.index(pattern) for c in converters if pattern in c.source_patterns), 0
        )
        targets[name] = (parameter, order)
    return targets
