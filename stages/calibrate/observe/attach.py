"""Attaches the observers: from here on every forward of the model adds to the statistics."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.attention import channels_last, observed_attention
from stages.calibrate.observe.experts import expert_parameters, watch_experts
from stages.calibrate.observe.sinks import Place, Sink
from stages.model.modules import ExpertsModule
from stages.model.skeleton import Skeleton
from state.layout import Layout, SiteArray
from state.names import Site, split_name


def _every(_memory: str) -> bool:
    return True


@contextmanager
def observed(skeleton: Skeleton, model: PreTrainedModel, layout: Layout, sink: Sink) -> Iterator[None]:
    """Within the context every forward of `model` is added to `sink`; its outputs stay bit-equal.

    skeleton: the same model without weights, for the names.
    """
    with (
        observed_rows(skeleton, model, layout, sink),
        observed_keys_and_values(skeleton, model, layout, sink),
    ):
        yield


@contextmanager
def observed_rows(
    skeleton: Skeleton,
    model: PreTrainedModel,
    layout: Layout,
    sink: Sink,
    chosen: Callable[[str], bool] = _every,
) -> Iterator[None]:
    """`observed` for the inputs of linears and experts.

    chosen: by memory name, whether to observe a module; all of them by default.
    """
    with ExitStack() as stack:
        for linear in skeleton.linears:
            if chosen(linear.memory) and stores_its_own(layout, Site(linear.hub, "input")):
                array, place = layout.locate(Site(linear.hub, "input"))
                module = model.get_submodule(linear.memory)
                hook = module.register_forward_pre_hook(_input_hook(sink, array, place), with_kwargs=True)
                stack.callback(hook.remove)
        for experts in skeleton.experts:
            if chosen(experts.memory):
                for hook in _watch(experts, model.get_submodule(experts.memory), layout, sink):
                    stack.callback(hook.remove)
        yield


@contextmanager
def observed_keys_and_values(
    skeleton: Skeleton, model: PreTrainedModel, layout: Layout, sink: Sink
) -> Iterator[None]:
    """`observed` for the keys and values of attention."""

    @cache
    def names() -> dict[nn.Module, str]:
        return {module: name for name, module in model.named_modules()}

    @cache
    def located(module: nn.Module) -> list[tuple[SiteArray, Place]]:
        name = skeleton.hub_name(names()[module])
        return [layout.locate(Site(name, "k")), layout.locate(Site(name, "v"))]

    def key_value(module: nn.Module, *observed: torch.Tensor) -> None:
        if module not in names():  # of a copy of a layer, whose folds are tried
            return
        for (array, place), values in zip(located(module), observed, strict=True):
            sink.add(array, place, channels_last(values))

    with observed_attention(key_value):
        yield


def stores_its_own(layout: Layout, site: Site) -> bool:
    """True where a site's statistics are stored under its own name, not under that of another which reads the
    same tensor.
    """
    array, _ = layout.locate(site)
    return (array.pattern, array.role) == (split_name(site.module)[0], site.role)


def record_weights(
    skeleton: Skeleton,
    model: PreTrainedModel,
    statistics: Accumulators,
    chosen: Callable[[str], bool] = _every,
) -> None:
    """Set max |W| of every linear, router and expert projection that is loaded. chosen: as in
    `observed_rows`.
    """
    layout = statistics.layout
    for linear in skeleton.linears:
        if not chosen(linear.memory):
            continue
        weight = linear.rows_of(model.get_submodule(linear.memory).weight)
        statistics.add_weights(*layout.locate(Site(linear.hub, "weight")), weight.flatten())
    for experts in skeleton.experts:
        if not chosen(experts.memory):
            continue
        for leaf, weights in split_projections(experts, model.get_submodule(experts.memory)).items():
            array, place = layout.locate(Site(f"{experts.hub}.0.{leaf}", "weight"))
            statistics.add_weights(array, place[:-1], weights.flatten(1))


def split_projections(experts: ExpertsModule, module: nn.Module) -> dict[str, torch.Tensor]:
    """Leaf → [experts, ...] view of its weights in the module's three-dimensional parameters."""
    first, second = expert_parameters(module)
    axis = 2 if experts.arranged.transposed else 1
    if len(experts.up) == 1:
        parts: tuple[torch.Tensor, ...] = (first,)
    elif experts.arranged.interleaved:
        parts = tuple(first.unflatten(axis, (-1, 2)).unbind(axis + 1))
    else:
        parts = first.chunk(2, dim=axis)
    return {**dict(zip(experts.up, parts, strict=True)), experts.down: second}


def _input_hook(
    sink: Sink, array: SiteArray, place: Place
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else next(iter(kwargs.values()))
        sink.add(array, place, values)

    return hook


def _watch(
    experts: ExpertsModule, module: nn.Module, layout: Layout, sink: Sink
) -> list[torch.utils.hooks.RemovableHandle]:
    leaves = {"up": experts.up[0], "down": experts.down}
    located = {
        projection: layout.locate(Site(f"{experts.hub}.0.{leaf}", "input"))
        for projection, leaf in leaves.items()
    }

    def grouped(projection: str, rows: torch.Tensor, ends: torch.Tensor) -> None:
        array, place = located[projection]
        sink.add_experts(array, place[:-1], rows, ends)

    def single(projection: str, rows: torch.Tensor, expert: int) -> None:
        array, place = located[projection]
        sink.add(array, (*place[:-1], expert), rows)

    return watch_experts(experts.memory, module, grouped, single)
