"""A decoder layer copied in float32, to be changed and run: its parts by hub name, its routing forced.

Routing is forced so that every expert gets tokens: wherever the copy picks the best of as many scores as
there are experts, it gets each of them in turn. What it picks from is compared, with what the layer hands on.
"""

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.calibrate.forward.rehearsal import Rehearsal
from stages.calibrate.observe.attach import split_projections
from stages.fold.folds import Operand
from stages.model.skeleton import Skeleton

ROOM = 3
"""Times its float32 weights that a GPU must have free for the copy to be there; else it is in host memory."""


class CopiedLayer:
    """A copy of a loaded layer.

    Args:
        name: of the layer in memory. module: the layer. rehearsal: how it is called. device: for the copy.
    """

    def __init__(
        self, skeleton: Skeleton, name: str, module: nn.Module, rehearsal: Rehearsal, device: torch.device
    ) -> None:
        self.skeleton, self.rehearsal = skeleton, rehearsal
        self.module = in_float32(module, device)
        self._prefix = f"{name}."
        self._linears = {linear.hub: linear for linear in skeleton.linears}
        own = [experts for experts in skeleton.experts if experts.memory.startswith(self._prefix)]
        self._projections: dict[str, Tensor] = {}
        for experts in own:
            held = self._get(experts.memory)
            for leaf, weights in split_projections(experts, held).items():
                for number, weight in enumerate(weights):
                    matrix = weight.mT if experts.arranged.transposed else weight
                    self._projections[f"{experts.hub}.{number}.{leaf}"] = matrix
        self._experts = {experts.count for experts in own}

    def part(self, operand: Operand) -> Tensor | None:
        """The operand in memory; None where it is kept in another shape."""
        if operand.module in self._projections:
            return self._projections[operand.module] if len(operand.shape) > 1 else None
        if operand.module in self._linears and operand.tensor == f"{operand.module}.weight":
            linear = self._linears[operand.module]
            part = linear.rows_of(self._get(linear.memory).weight)
        elif operand.tensor in self.skeleton.parameter_of:
            memory, _, leaf = self.skeleton.parameter_of[operand.tensor][0].rpartition(".")
            part = getattr(self._get(memory), leaf)
        else:
            return None
        return part if isinstance(part, Tensor) and tuple(part.shape) == operand.shape else None

    def run(self) -> dict[str, Tensor]:
        """Everything the layer hands on, what it chose from, and its buffers."""
        with Chosen(self._experts) as chosen:
            outputs = dict(self.rehearsal.run(self.module))
        outputs |= {f"chosen from {number}": scores for number, scores in enumerate(chosen.scores)}
        return outputs | {f"buffer {name}": held.clone() for name, held in self.module.named_buffers()}

    def _get(self, memory: str) -> Any:
        return self.module.get_submodule(memory.removeprefix(self._prefix))


class Chosen(TorchFunctionMode):
    """Records what every `topk` chooses from. Among as many scores as there are experts it chooses them in
    turn.
    """

    def __init__(self, experts: set[int]) -> None:
        super().__init__()
        self.experts = experts
        self.scores: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return found
        scores: Tensor = args[0] if args else (kwargs or {})["input"]
        self.scores.append(scores.clone())
        if scores.shape[-1] not in self.experts or found.indices.shape[:-1] != scores.shape[:-1]:
            return found
        turns = torch.arange(found.indices.numel(), device=scores.device) % scores.shape[-1]
        indices = turns.view(found.indices.shape)
        return torch.return_types.topk((scores.gather(-1, indices), indices))


def in_float32(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on `device` whose floats are float32; its configuration is shared."""
    memo: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to(device, dtype, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied
    for part in module.modules():
        config = getattr(part, "config", None)
        memo[id(config)] = config
    return copy.deepcopy(module, memo)


def places_for(module: nn.Module) -> list[torch.device]:
    """Where a copy may be, best first: where the module is, unless a GPU has too little left, and in host
    memory.
    """
    host, own = torch.device("cpu"), next((held.device for held in module.parameters()), torch.device("cpu"))
    if own == host:
        return [host]
    needed = ROOM * 4 * sum(held.numel() for held in module.parameters())
    return [own, host] if needed <= torch.cuda.mem_get_info(own)[0] else [host]
