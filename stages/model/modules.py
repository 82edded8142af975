"""The modules of a model that have weights to quantize, by their hub names and their names in memory."""

from dataclasses import dataclass


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
    instead of expert by expert. biased: each projection has a bias.
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
    biased: bool

    def projections(self, expert: int) -> list[str]:
        """Hub names of one expert's projections, first projection before second."""
        return [f"{self.hub}.{expert}.{leaf}" for leaf in (*self.up, self.down)]
