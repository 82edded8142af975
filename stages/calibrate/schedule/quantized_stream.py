"""What a solver takes from the second stream, and how that goes on behind a solved layer."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.attach import observed_rows
from stages.calibrate.observe.rounded import Rounding, rounded_inputs
from stages.calibrate.observe.second_moments import Moments
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.formats.quantized import Quantized
from stages.model.skeleton import Skeleton
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.unified_inputs import Groups, input_quantizer, solver_inputs
from state.names import Site, split_name


class QuantizedStream:
    """Hidden states that come out of quantized layers, with inputs rounded as engines round them.

    The scales of inputs are those that an export under `INPUT_POLICIES` writes; they come from the
    statistics, which are those of the model as it is.
    """

    def __init__(self, skeleton: Skeleton, quantizers: QuantizerPlan, statistics: Accumulators) -> None:
        self.skeleton, self.quantizers, self.statistics = skeleton, quantizers, statistics
        self._inputs: dict[int, dict[str, str]] = defaultdict(dict)
        for module, quantizer in quantizers.inputs.items():
            layer = split_name(module)[1]
            if layer is not None:
                self._inputs[layer][module] = quantizer
        self._same_input = _by_layer(statistics.layout.groups("same_input"))
        self._engine_fused = _by_layer(statistics.layout.groups("engine_fused"))

    def collect(self, step: LayerStep, moments: Moments) -> None:
        """Add what the layer's quantized modules will multiply with to `moments`."""
        assert step.replay is not None
        layout, model = self.statistics.layout, self.skeleton.model
        with (
            observed_rows(self.skeleton, model, layout, moments, lambda name: _is_in(name, step.name)),
            self.rounded(step),
        ):
            step.replay.sweep(step.module)

    def advance(self, step: LayerStep, solution: Mapping[str, Tensor]) -> None:
        """Go on behind a layer that is quantized as its solution says, or as it is where that is empty.

        solution: its arrays by name, as `solve_layer` gives them.
        """
        assert step.replay is not None
        matrices = LayerMatrices(self.skeleton, self.quantizers.weights, step.layer)
        found = {
            name: self._dequantized(name, module, solution)
            for name, (module, _) in matrices.read().items()
            if f"{name}@values" in solution
        }
        if not found:
            step.replay.advance(step.module)
            return
        with self.rounded(step):
            step.replay.advance(matrices.replaced(step.name, found))

    def rounded(self, step: LayerStep) -> AbstractContextManager[None]:
        """A context within which the layer's modules multiply with rounded inputs."""
        return rounded_inputs(self.skeleton, self.skeleton.model, step.name, self._roundings(step.layer))

    def _roundings(self, layer: int) -> dict[str, Rounding]:
        """What rounds the inputs of a layer's modules: those that the recipe quantizes and tokens reached."""
        inputs = self._inputs.get(layer, {})
        amax = solver_inputs(
            {input_quantizer(module): self._amax(module) for module in inputs},
            replace(self.quantizers, inputs=inputs),
            self._same_input.get(layer, []),
            self._engine_fused.get(layer, []),
        )
        device = next(iter(self.statistics.tokens.values())).device
        formats = self.quantizers.weights
        return {
            module: (formats[module], formats[module].input_scale(value).to(device))
            for module, value in amax.items()
            if value is not None
        }

    def _amax(self, module: str) -> Tensor:
        """Amax of a module's input, f32 `[channels]` in host memory; NaN where no token reached it."""
        array, place = self.statistics.layout.locate(Site(module, "input"))
        amax, tokens = self.statistics.amax[array.key][place], self.statistics.tokens[array.key][place]
        return torch.where(tokens > 0, amax, torch.nan).cpu()

    def _dequantized(self, name: str, module: str, solution: Mapping[str, Tensor]) -> Tensor:
        """The weights that export will write, [E, out, in]."""
        values, scale, amax = (
            solution[f"{name}@{field}"] for field in ("values", "block_scale", "weight_amax")
        )
        if amax.dim() == 0:  # of one linear
            values, scale, amax = values[None], scale[None], amax[None]
        return Quantized.decoded(self.quantizers.weights[module], values, scale, amax).dequantize()


def _is_in(name: str, layer: str) -> bool:
    return name.startswith(f"{layer}.")


def _by_layer(groups: Groups) -> dict[int | None, list[tuple[str, ...]]]:
    found: dict[int | None, list[tuple[str, ...]]] = defaultdict(list)
    for group in groups:
        found[split_name(group[0])[1]].append(tuple(group))
    return found
