"""The model without its weights: built on the meta device, with every module named as the hub names it.

Hub names (`model.layers.3.mlp.experts.17.up_proj`) are what engines read and what this project stores. Memory
names are where transformers keeps the same weights, possibly fused
(`model.layers.3.mlp.experts.gate_up_proj`).
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from stages.model.build import build_meta_model
from stages.model.cast_source import set_dtype
from stages.model.dequantize.stated import without_quantization
from stages.model.fused_experts import expert_matrices, fused_hub_name
from stages.model.matrices import StoredMatrix
from stages.model.merged_linears import linears_of
from stages.model.modules import Arrangement, ExpertsModule, LinearModule, arrangement
from stages.model.own_code import refuse_own_code
from stages.model.plausible import read_config
from stages.model.tensor_map import map_tensors, operations
from state.errors import InputError
from state.reasons import reason
from state.source import TensorEntry
from state.weights_file import weights_file


def load_config(folder: Path, trust_remote_code: bool = False, dtype: str | None = None) -> PretrainedConfig:
    """The model's configuration. Raises InputError when it is missing, unreadable or of an unknown kind.

    dtype: torch's name of what it computes in; None: what the file says.
    """
    read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # the class of a model computes with what it finds, and raises what comes of it
        refuse_own_code(folder, error)
        raise InputError(
            f"{folder}/config.json can't be used: {type(error).__name__}: {reason(error)}"
        ) from error
    if dtype is not None:
        set_dtype(config, dtype)
    return config


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
        tensors: every tensor of the hub checkpoint, by name.
    Raises InputError when transformers can't build a causal language model from the configuration.
    """

    def __init__(
        self, config: PretrainedConfig, tensors: Mapping[str, TensorEntry], trust_remote_code: bool = False
    ) -> None:
        plain = type(config).from_dict(without_quantization(config.to_dict()))
        self.model = build_meta_model(plain, trust_remote_code)
        self.config = self.model.config
        self.parameter_of = map_tensors(self.model, tensors)
        self.tensors = tensors
        self._trust_remote_code = trust_remote_code

    def build_again(self) -> PreTrainedModel:
        """Another model like this one, for whoever changes it."""
        return build_meta_model(self.config, self._trust_remote_code)

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

    def hub_names(self, memory: str) -> list[str]:
        """`hub_name`, or those of all linears that are merged in a linear of the class."""
        merged = [linear.hub for linear in self.linears if linear.merged and linear.memory == memory]
        return merged or [self.hub_name(memory)]

    @cached_property
    def linears(self) -> list[LinearModule]:
        """Every linear and router, in the model's own order.

        Raises InputError for one that several hub tensors feed otherwise than one below the other.
        """
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) or is_router(module):
                sources = self._sources(f"{name}.weight")
                found += linears_of(
                    LinearModule(self.hub_name(name), name, module.weight.shape[1], module.weight.shape[0]),
                    [self.tensors[tensor] for tensor in sources],
                    operations(self.model, sources) if len(sources) > 1 else (),
                )
        return found

    @cached_property
    def experts(self) -> list[ExpertsModule]:
        """Every module of fused experts that can be observed: those in transformers' experts registry, and
        those that multiply all experts at once.

        Raises InputError for other three-dimensional expert weights.
        """
        found = []
        for name, module in self.model.named_modules():
            arranged = arrangement(module)
            if arranged is not None:
                found.append(self._experts_module(name, module, arranged))
            elif (
                any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
                and "expert" in name
            ):
                raise InputError(
                    f"{name} ({type(module).__name__}) keeps its experts fused outside transformers' experts "
                    "registry; such models are not supported yet (supported: fused experts in it, or as "
                    "Llama 4 has them; experts as nn.Linear)"
                )
        return found

    def holds(self, tensor: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return tensor in self.tensors

    @cached_property
    def embeddings(self) -> set[str]:
        """Hub tensors of embeddings."""
        names = {
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
        }
        return {tensor for tensor, (parameter, _) in self.parameter_of.items() if parameter in names}

    def is_of_text(self, memory: str) -> bool:
        """Whether a module, by memory name, is part of the language model or its output head, and not of a
        tower or a projector beside it.
        """
        if self._text_models is None:
            return True
        head = self.model.get_output_embeddings()
        return self.model.get_submodule(memory) is head or f"{memory}.".startswith(self._text_models)

    @cached_property
    def _text_models(self) -> tuple[str, ...] | None:
        """What the memory names of the language model's modules begin with; None where that is the whole."""
        text = self.config.get_text_config()
        if text is self.config:
            return None
        owners = [
            name for name, module in self.model.named_modules() if getattr(module, "config", None) is text
        ]
        return tuple(f"{name}." for name in owners if name) or None

    def matrix(self, module: str) -> StoredMatrix:
        """Where the checkpoint keeps the weight of a linear, router or expert projection, by hub name."""
        return self._fused_matrices.get(module) or StoredMatrix(f"{module}.weight")

    @cached_property
    def _fused_matrices(self) -> dict[str, StoredMatrix]:
        """Where each expert's projections lie, for experts that are fused on the hub."""
        found: dict[str, StoredMatrix] = {}
        for experts in self.experts:
            if not experts.fused_on_hub:
                continue
            module = self.model.get_submodule(experts.memory)
            for parameter, leaves in ((experts.up_parameter, experts.up), ("down_proj", (experts.down,))):
                sources = self._sources(f"{experts.memory}.{parameter}")
                found |= expert_matrices(
                    experts.hub,
                    leaves,
                    experts.arranged,
                    getattr(module, parameter).shape,
                    [self.tensors[name] for name in sources],
                    operations(self.model, sources),
                )
        return found

    @cached_property
    def expert_tensors(self) -> dict[str, str]:
        """Hub tensor that holds a projection of all experts → hub name of the experts' module."""
        return {
            tensor: experts.hub
            for experts in self.experts
            if experts.fused_on_hub
            for parameter in (experts.up_parameter, "down_proj")
            for tensor in self._sources(f"{experts.memory}.{parameter}")
        }

    def _sources(self, parameter: str) -> list[str]:
        """The hub tensors that feed a parameter, in order."""
        return self._feeding.get(parameter, [])

    @cached_property
    def _feeding(self) -> dict[str, list[str]]:
        """Parameter → the hub tensors that feed it, in order."""
        found: dict[str, list[str]] = {}
        for name, (fed, _) in sorted(self.parameter_of.items(), key=lambda item: (item[1][1], item[0])):
            found.setdefault(fed, []).append(name)
        return found

    def projections(self) -> list[str]:
        """Hub names of all that has a weight: linears, routers and each expert's projections."""
        names = [linear.hub for linear in self.linears]
        for experts in self.experts:
            for number in range(experts.count):
                names += experts.projections(number)
        return names

    def _experts_module(self, memory: str, module: nn.Module, arranged: Arrangement) -> ExpertsModule:
        up_parameter = "gate_up_proj" if arranged.gated else "up_proj"
        up = getattr(module, up_parameter)
        hidden, width = (up.shape[1], up.shape[2]) if arranged.transposed else (up.shape[2], up.shape[1])
        first = self._expert_leaves(f"{memory}.{up_parameter}")
        second = self._expert_leaves(f"{memory}.down_proj")
        fused_on_hub = not first
        if fused_on_hub:
            hub = self._fused_hub_name(memory, up_parameter)
            first, second = {"gate_proj": hub, "up_proj": hub}, {"down_proj": hub}
            if not arranged.gated:
                first = {"up_proj": hub}
        return ExpertsModule(
            hub=next(iter(first.values())),
            memory=memory,
            count=up.shape[0],
            up=tuple(first),
            down=next(iter(second)),
            up_parameter=up_parameter,
            hidden=hidden,
            intermediate=width // (2 if arranged.gated else 1),
            fused_on_hub=fused_on_hub,
            arranged=arranged,
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

    def _fused_hub_name(self, memory: str, up_parameter: str) -> str:
        sources = self._sources(f"{memory}.{up_parameter}")
        return fused_hub_name(sources[0]) if sources else memory


def is_router(module: nn.Module) -> bool:
    """True for routers that multiply with a two-dimensional weight without being an `nn.Linear` (Qwen3-MoE's
    TopKRouter).
    """
    kind = type(module).__name__.lower()
    weight = module._parameters.get("weight")
    return ("router" in kind or "gate" in kind) and weight is not None and weight.dim() == 2
