"""The quantized matrices of a loaded decoder layer, stacked as solvers take them, and the layer with others
in their place.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stages.calibrate.forward.calls import Layer
from stages.calibrate.observe.attach import split_projections
from stages.model.modules import ExpertsModule, LinearModule
from stages.model.skeleton import Skeleton
from stages.recipe.solvers import stacked_name
from state.names import split_name


class LayerMatrices:
    """A layer's matrices by stacked hub name.

    Args:
        quantized: hub modules with a quantized weight, of any layer. layer: its number.
    """

    def __init__(self, skeleton: Skeleton, quantized: Collection[str], layer: int) -> None:
        self.model: nn.Module = skeleton.model
        self._linears = [
            linear
            for linear in skeleton.linears
            if split_name(linear.hub)[1:] == (layer, None) and linear.hub in quantized
        ]
        self._fused = [experts for experts in skeleton.experts if split_name(experts.hub)[1] == layer]
        self._experts = _linear_experts(skeleton, quantized, layer)
        self._quantized = quantized

    def read(self) -> dict[str, tuple[str, Tensor]]:
        """Stacked name → (hub name, of expert 0 for experts; weights [E, out, in], E = 1 for one linear)."""
        found = {linear.hub: (linear.hub, self._rows(linear)[None]) for linear in self._linears}
        for experts in self._fused:
            module = self.model.get_submodule(experts.memory)
            for leaf, weights in split_projections(experts, module).items():
                hub = f"{experts.hub}.0.{leaf}"
                if hub in self._quantized:
                    found[stacked_name(hub)] = hub, weights.mT if experts.arranged.transposed else weights
        for name, members in self._experts.items():
            found[name] = members[0].hub, torch.stack([self._rows(member) for member in members])
        return found

    def parameters(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter in memory → its values with `matrices` in it, in its own dtype.

        matrices: stacked name → [E, out, in]; the gradient of the result flows into them.
        """
        found: dict[str, Tensor] = {}
        replaced = [(linear, matrices[linear.hub][0]) for linear in self._linears if linear.hub in matrices]
        for name, members in self._experts.items():
            if name in matrices:
                replaced += zip(members, matrices[name].unbind(0), strict=True)
        for linear, matrix in replaced:
            parameter = f"{linear.memory}.weight"
            whole = found.get(parameter, self.model.get_parameter(parameter))
            found[parameter] = _with_rows(whole, linear, matrix)
        for experts in self._fused:
            found |= self._fused_parameters(experts, matrices)
        state = dict(self.model.named_parameters())
        return {name: values.to(state[name].dtype) for name, values in found.items()}

    def replaced(self, name: str, matrices: Mapping[str, Tensor]) -> Layer:
        """The layer of this name in memory with other matrices, to be called as it is; it stays unchanged."""
        module = self.model.get_submodule(name)
        own = {
            memory.removeprefix(f"{name}."): values for memory, values in self.parameters(matrices).items()
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, own, args, kwargs)

        return call

    def _fused_parameters(self, experts: ExpertsModule, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        module = self.model.get_submodule(experts.memory)
        leaves = {
            leaf: matrices.get(stacked_name(f"{experts.hub}.0.{leaf}"))
            for leaf in (*experts.up, experts.down)
        }
        if all(matrix is None for matrix in leaves.values()):
            return {}
        parts = split_projections(experts, module)
        for leaf, matrix in leaves.items():
            if matrix is not None:
                parts[leaf] = matrix.mT if experts.arranged.transposed else matrix
        first = _joined([parts[leaf] for leaf in experts.up], experts)
        return {
            f"{experts.memory}.{experts.up_parameter}": first,
            f"{experts.memory}.down_proj": parts[experts.down],
        }

    def _rows(self, linear: LinearModule) -> Tensor:
        return linear.rows_of(self.model.get_parameter(f"{linear.memory}.weight"))


def _with_rows(whole: Tensor, linear: LinearModule, matrix: Tensor) -> Tensor:
    """The class's weight with other rows for one of the hub's linears that it is made of."""
    if not linear.merged:
        return matrix
    end = linear.first + linear.out_features
    return torch.cat([whole[: linear.first].to(matrix.dtype), matrix, whole[end:].to(matrix.dtype)])


def _joined(parts: list[Tensor], experts: ExpertsModule) -> Tensor:
    """The parts of a first projection in one parameter, as `split_projections` takes them out of it."""
    if len(parts) == 1:
        return parts[0]
    axis = 2 if experts.arranged.transposed else 1
    parts = [part.to(parts[0].dtype) for part in parts]
    if experts.arranged.interleaved:
        return torch.stack(parts, dim=axis + 1).flatten(axis, axis + 1)
    return torch.cat(parts, dim=axis)


def _linear_experts(
    skeleton: Skeleton, quantized: Collection[str], layer: int
) -> dict[str, list[LinearModule]]:
    """Experts that are linears of their own, in order, by stacked name."""
    members: dict[str, dict[int, LinearModule]] = {}
    for linear in skeleton.linears:
        _, own_layer, expert = split_name(linear.hub)
        if own_layer == layer and expert is not None and linear.hub in quantized:
            members.setdefault(stacked_name(linear.hub), {})[expert] = linear
    return {name: [found[expert] for expert in sorted(found)] for name, found in members.items()}
