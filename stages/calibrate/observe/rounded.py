"""Inputs as engines round them: within the context the linears and experts of a layer multiply with these."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.calibrate.observe.experts import watch_experts
from stages.formats import WeightFormat
from stages.model.modules import ExpertsModule
from stages.model.skeleton import Skeleton

Rounding = tuple[WeightFormat, Tensor]
"""The format of a module's weight, which says how its inputs are rounded, and their scale, f32 `[]`."""


class RoundInput(torch.autograd.Function):
    """`WeightFormat.round_input`, with the gradient handed straight through: what is clipped gets one too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        return rounding[0].round_input(x, rounding[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Rounder:
    """Rounds inputs; q, k and v, handed the same tensor one after the other, get the same result."""

    def __init__(self) -> None:
        self._known: dict[tuple[WeightFormat, float], Rounding] = {}
        self._last: tuple[Tensor, Rounding, Tensor] | None = None

    def known(self, rounding: Rounding) -> Rounding:
        """One object for all roundings that are equal. Looks at the scale, for which a GPU is waited for."""
        return self._known.setdefault((rounding[0], rounding[1].item()), rounding)

    def __call__(self, x: Tensor, rounding: Rounding) -> Tensor:
        """x, `[..., K]`, as an engine multiplies with it."""
        if self._last is None or self._last[0] is not x or self._last[1] is not rounding:
            self._last = x, rounding, RoundInput.apply(x, rounding)
        return self._last[2]


@contextmanager
def rounded_inputs(
    skeleton: Skeleton, model: nn.Module, layer: str, roundings: Mapping[str, Rounding]
) -> Iterator[None]:
    """Within the context the modules below `layer` multiply with rounded inputs.

    Observers that were attached before see the rounded ones.

    Args:
        layer: its name in memory. roundings: by hub module; others see their inputs as they are.
    """
    rounder = Rounder()
    with ExitStack() as stack:
        # By name in memory: linears that the class merges have one input, which is rounded once.
        linears = {
            linear.memory: rounder.known(roundings[linear.hub])
            for linear in skeleton.linears
            if linear.memory.startswith(f"{layer}.") and linear.hub in roundings
        }
        for memory, rounding in linears.items():
            hook = _hook(rounder, rounding)
            handle = model.get_submodule(memory).register_forward_pre_hook(
                hook, prepend=True, with_kwargs=True
            )
            stack.callback(handle.remove)
        for experts in skeleton.experts:
            if experts.memory.startswith(f"{layer}."):
                module = model.get_submodule(experts.memory)
                for handle in _round_experts(experts, module, roundings):
                    stack.callback(handle.remove)
        yield


def _hook(
    rounder: Rounder, rounding: Rounding
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (rounder(args[0], rounding), *args[1:]), kwargs
        name, values = next(iter(kwargs.items()))
        return args, {**kwargs, name: rounder(values, rounding)}

    return hook


def _round_experts(
    experts: ExpertsModule, module: nn.Module, roundings: Mapping[str, Rounding]
) -> list[RemovableHandle]:
    leaves = {"up": experts.up[0], "down": experts.down}

    def rounded(projection: str, rows: Tensor, expert: int) -> Tensor | None:
        rounding = roundings.get(f"{experts.hub}.{expert}.{leaves[projection]}")
        return None if rounding is None else RoundInput.apply(rows, rounding)

    # One scale for all experts of a fused module, that of the first.
    return watch_experts(
        experts.memory, module, lambda projection, rows, _ends: rounded(projection, rows, 0), rounded
    )
