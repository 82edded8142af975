"""Where observed rows go."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from state.layout import SiteArray

Place = tuple[int, ...]


class Sink(Protocol):
    """Takes what observers see; places are as `Layout.locate` gives them."""

    def add(self, array: SiteArray, place: Place, values: torch.Tensor) -> None:
        """Tokens of one site, [..., channels]."""

    def add_experts(self, array: SiteArray, place: Place, values: torch.Tensor, ends: torch.Tensor) -> None:
        """Rows sorted by expert, and where each expert's rows end."""


class Selected:
    """Hands everything to the sinks of the moment, in order."""

    def __init__(self) -> None:
        self.sinks: Sequence[Sink] = ()

    @contextmanager
    def hand_to(self, *sinks: Sink) -> Iterator[None]:
        """Within the context these sinks, and none after it."""
        self.sinks = sinks
        try:
            yield
        finally:
            self.sinks = ()

    def add(self, array: SiteArray, place: Place, values: torch.Tensor) -> None:
        for sink in self.sinks:
            sink.add(array, place, values)

    def add_experts(self, array: SiteArray, place: Place, values: torch.Tensor, ends: torch.Tensor) -> None:
        for sink in self.sinks:
            sink.add_experts(array, place, values, ends)
