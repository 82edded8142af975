"""Which sites share an input, which follow the same norm, and which an engine fuses.

The first two are found, not listed by family: during one short forward every module that multiplies an input
with a weight is watched, and the tensors that reach it are compared. *Same input* means the same tensor
object (modelopt's own grouping); *norm consumers* means the same storage, views included. The forward runs on
the meta device where it can: no weights needed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from stages.calibrate.observe.attention import observed_attention
from stages.calibrate.observe.lm_head import without_logits
from stages.model.engine_fused import ENGINE_FUSED
from stages.model.modules import is_registry_experts
from stages.model.skeleton import Skeleton
from state.layout import Relation, RelationKind
from state.names import split_name

PROBE_TOKENS = 8


@dataclass
class Probe:
    """What one forward showed, in hub names.

    inputs: (module, tensor identity, storage identity) for every input that reached a weight. norms: storage
    identity of a norm's output → the norm. kv_channels: attention module → (K channels, V channels);
    value_heads: attention module → heads of V. memory: attention module → its name in memory.
    """

    inputs: list[tuple[str, int, int]] = field(default_factory=list)
    norms: dict[int, str] = field(default_factory=dict)
    kv_channels: dict[str, tuple[int, int]] = field(default_factory=dict)
    value_heads: dict[str, int] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)


def probe(skeleton: Skeleton, model: PreTrainedModel, masks_on_meta: bool = False) -> Probe:
    """Run PROBE_TOKENS tokens through the model (on the meta device: its shapes) and record which tensor
    reached what. masks_on_meta: as in `observed_attention`.
    """
    found = Probe()
    kept: list[torch.Tensor] = []  # keeps every tensor alive, so that identities stay unique

    def consumer(name: str) -> None:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            kept.append(args[0])
            found.inputs.append((name, id(args[0]), args[0].untyped_storage()._cdata))

        handles.append(model.get_submodule(memory[name]).register_forward_pre_hook(hook))

    def norm(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            kept.append(output)
            found.norms[output.untyped_storage()._cdata] = name

        handles.append(module.register_forward_hook(hook))

    def key_value(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        attention = skeleton.hub_name(names[id(module)])
        found.memory[attention] = names[id(module)]
        found.value_heads[attention] = value.shape[1]
        found.kv_channels[attention] = (key.shape[1] * key.shape[3], value.shape[1] * value.shape[3])

    memory = {linear.hub: linear.memory for linear in skeleton.linears}
    memory |= {experts.hub: experts.memory for experts in skeleton.experts}
    names = {id(module): name for name, module in model.named_modules()}
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for hub in memory:
            consumer(hub)
        for name, module in model.named_modules():
            if is_norm(module):
                norm(skeleton.hub_name(name), module)
        tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=model.device)
        with (
            torch.inference_mode(),
            without_logits(model),
            observed_attention(key_value, masks_on_meta),
            _shapes_only(model),
        ):
            # With an explicit mask transformers doesn't search the positions for packed documents.
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def relations(skeleton: Skeleton, found: Probe) -> tuple[Relation, ...]:
    """The three kinds of relations as patterns with the layers they hold in, in a stable order."""
    experts = {module.hub: module for module in skeleton.experts}
    same: dict[int, list[str]] = defaultdict(list)
    consumers: dict[str, list[str]] = defaultdict(list)
    for name, tensor, storage in found.inputs:
        members = [name] if name not in experts else [f"{name}.0.{leaf}" for leaf in experts[name].up]
        if (
            name in experts
        ):  # each expert has rows of its own, whatever else reads the tensor they were picked from
            same[-len(same)] = members
        else:
            same[tensor].append(name)
        if storage in found.norms:
            consumers[found.norms[storage]].extend(members)
    groups: list[tuple[RelationKind, str | None, list[str]]] = []
    groups += [("same_input", None, members) for members in same.values()]
    groups += [("norm_consumers", norm, members) for norm, members in consumers.items()]
    groups += [("engine_fused", None, members) for members in engine_fused(skeleton)]
    layers: dict[tuple[RelationKind, str | None, tuple[str, ...]], set[int]] = defaultdict(set)
    for kind, norm_name, members in groups:
        patterns = tuple(dict.fromkeys(split_name(member)[0] for member in members))
        layer = split_name(members[0])[1]
        norm_pattern = split_name(norm_name)[0] if norm_name else None
        layers[kind, norm_pattern, patterns] |= set() if layer is None else {layer}
    return tuple(
        Relation(kind=kind, norm=norm, members=members, layers=tuple(sorted(held)))
        for (kind, norm, members), held in layers.items()
        if len(members) > 1 or kind == "norm_consumers"
    )


def is_norm(module: nn.Module) -> bool:
    """True for layer norms and RMS norms of any family, by the one thing they share: their class name."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def engine_fused(skeleton: Skeleton) -> Iterator[list[str]]:
    """Groups of linears that engines load as one, by hub name; of fused experts, the first stands for all."""
    names: Iterable[str] = [linear.hub for linear in skeleton.linears]
    names = [*names, *(f"{module.hub}.0.{leaf}" for module in skeleton.experts for leaf in module.up)]
    known = set(names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for leaves in ENGINE_FUSED:
            members = [f"{parent}.{other}" for other in leaves if f"{parent}.{other}" in known]
            if leaf == leaves[0] and len(members) > 1:
                yield members


@contextmanager
def _shapes_only(model: PreTrainedModel) -> Iterator[None]:
    """On the meta device, let experts modules hand their input on: their loop over routed experts needs real
    routing.
    """
    if model.device.type != "meta":
        yield
        return
    modules = [module for module in model.modules() if is_registry_experts(module)]
    for module in modules:
        module.forward = lambda hidden, *_args, **_kwargs: torch.empty_like(hidden)
    try:
        with _Decided():
            yield
    finally:
        for module in modules:
            del module.forward


class _Decided(TorchFunctionMode):
    """Answers yes where a forward asks a tensor without values: "is everything attended to?" before a mask is
    built. The probe's mask is all ones, so yes is the answer.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))
