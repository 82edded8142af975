"""Statistics as they grow on the device: one tensor per stored array, each observed site a row of it.

On the device a site never observed is plain zeros with zero tokens, so that merging is one maximum and one
addition. The store's own marks (NaN: never observed) are put on and taken off at its door, in `snapshot` and
in the constructor.
"""

from collections.abc import Mapping

import numpy as np
import torch

from stages.calibrate.observe.host import to_host
from stages.calibrate.observe.reduce import Seen, add_groups, add_rows
from stages.calibrate.observe.sinks import Place
from stages.model.weights import largest_magnitude
from state.layout import Layout, SiteArray


class Accumulators:
    """All statistics of a run, shaped as the store keeps them.

    Args:
        layout: the arrays to keep. stored: arrays of an earlier commit to go on from, by `statistic/key`;
        none at the start.
    """

    def __init__(
        self, layout: Layout, device: torch.device, stored: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.layout = layout
        self.amax: dict[str, torch.Tensor] = {}
        self.total: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, Place], Seen] = {}
        for array in layout.arrays:
            key = array.key
            if array.role == "weight":
                self.weights[key] = torch.full(array.shape("weight_amax"), float("nan"), device=device)
                continue
            self.amax[key] = torch.zeros(array.shape("amax"), dtype=torch.float32, device=device)
            self.total[key] = torch.zeros(array.shape("abs_sum"), dtype=torch.float64, device=device)
            self.tokens[key] = torch.zeros(array.shape("tokens"), dtype=torch.int64, device=device)
        if stored:
            self._restore(stored)

    def add(self, array: SiteArray, place: Place, values: torch.Tensor) -> None:
        """Merge tokens of the site at `place` of an array. values: [..., channels], any float dtype."""
        add_rows(self._seen(array.key, place), values.detach().reshape(-1, values.shape[-1]))

    def add_experts(self, array: SiteArray, place: Place, values: torch.Tensor, ends: torch.Tensor) -> None:
        """Merge rows sorted by expert into all experts of one layer, as `add_groups` takes them."""
        add_groups(self._seen(array.key, place), values.detach(), ends)

    def add_weights(self, array: SiteArray, place: Place, weights: torch.Tensor) -> None:
        """Set max |W| of one linear (weights [n]) or of one projection of all experts of a layer
        ([experts, n])."""
        largest_magnitude(weights, out=self.weights[array.key][place])

    def set_weight(self, array: SiteArray, place: Place, amax: float) -> None:
        """Set max |W| of one linear, found elsewhere."""
        self.weights[array.key][place] = amax

    def is_finite(self, layer: int) -> bool:
        """Whether every input, K and V that a decoder layer saw was a number."""
        rows = [
            self.amax[array.key][array.layers.index(layer)]
            for array in self.layout.arrays
            if array.role != "weight" and layer in array.layers
        ]
        return not rows or bool(torch.stack([row.isfinite().all() for row in rows]).all())

    def _seen(self, key: str, place: Place) -> Seen:
        """Views of one site's statistics, made once."""
        if (key, place) not in self._views:
            self._views[key, place] = Seen(
                self.amax[key][place], self.total[key][place], self.tokens[key][place]
            )
        return self._views[key, place]

    def snapshot(self) -> dict[str, np.ndarray]:
        """Every statistic copied to host memory, in the store's form.

        Never observed: NaN (tokens -1). Observed with a value that is no number: inf, so that it can't be
        mistaken for it.
        """
        tensors = {f"weight_amax/{key}": tensor for key, tensor in self.weights.items()}
        for key in self.amax:
            tensors[f"amax/{key}"] = self.amax[key]
            tensors[f"abs_sum/{key}"] = self.total[key]
            tensors[f"tokens/{key}"] = self.tokens[key]
        arrays = to_host(tensors)
        for key in self.amax:
            tokens = arrays[f"tokens/{key}"]
            for name in ("amax", "abs_sum"):
                values = arrays[f"{name}/{key}"]
                values[np.isnan(values)] = np.inf
                values[tokens == 0] = np.nan
            tokens[tokens == 0] = -1
        return arrays

    def _restore(self, stored: Mapping[str, np.ndarray]) -> None:
        for key, tensor in self.weights.items():
            tensor.copy_(torch.from_numpy(np.array(stored[f"weight_amax/{key}"])))
        for key in self.amax:
            seen = stored[f"tokens/{key}"] > 0
            for name, tensors in (("amax", self.amax), ("abs_sum", self.total)):
                values = np.where(seen[..., None], stored[f"{name}/{key}"], 0)
                tensors[key].copy_(torch.from_numpy(values))
            self.tokens[key].copy_(torch.from_numpy(np.where(seen, stored[f"tokens/{key}"], 0)))
