"""The modules of a model that have weights to quantize, by their hub names and their names in memory."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LinearModule:
    """An `nn.Linear`, or a router with a weight of its own: y = x Wᵀ with W of shape [out_features,
    in_features]. Where the class merges several of the hub's into one, each is a range of its rows.

    first: the row of the class's weight at which this begins. merged: there are others beside it.
    """

    hub: str
    memory: str
    in_features: int
    out_features: int
    first: int = 0
    merged: bool = False

    def rows_of(self, weight: Tensor) -> Tensor:
        """The view `[out_features, in_features]` of the class's weight."""
        return weight[self.first : self.first + self.out_features]


@dataclass(frozen=True)
class Arrangement:
    """How a module holds the matrices of all its experts.

    gated: gate and up share the first parameter, `gate_up_proj`; it is `up_proj` otherwise. transposed:
    parameters are `[experts, in, out]`. interleaved: gate and up in turns, not one after the other. biased:
    each projection has a bias.
    """

    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool


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
    arranged: Arrangement

    def projections(self, expert: int) -> list[str]:
        """Hub names of one expert's projections, first projection before second."""
        return [f"{self.hub}.{expert}.{leaf}" for leaf in (*self.up, self.down)]


def is_registry_experts(module: nn.Module) -> bool:
    """True for expert modules whose class carries transformers' `use_experts_implementation` decorator."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def arrangement(module: nn.Module) -> Arrangement | None:
    """What is known of a module of experts: what it says of itself in transformers' registry; outside it,
    what the shapes say of one that multiplies all experts at once (Llama 4). None for every other module.

    Shapes do not tell halves from turns. That matters only where gate and up come apart on export, and what
    lies outside the registry stays together: see `stages/recipe/quantizers.py`.
    """
    if is_registry_experts(module):
        return Arrangement(
            module.has_gate,  # type: ignore[arg-type]
            module.is_transposed,  # type: ignore[arg-type]
            not module.is_concatenated,
            module.has_bias,  # type: ignore[arg-type]
        )
    own = module._parameters
    first, second = own.get("gate_up_proj"), own.get("down_proj")
    if len(own) != 2 or first is None or second is None or first.dim() != 3:
        return None
    experts, hidden, width = first.shape
    if tuple(second.shape) != (experts, width // 2, hidden):
        return None
    return Arrangement(gated=True, transposed=True, interleaved=False, biased=False)
