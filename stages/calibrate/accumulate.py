"""Statistics as they grow on the device: one tensor per stored array, each observed site a row of it.

On the device a site never observed is plain zeros with zero tokens, so that merging is one maximum and one
addition. The store's own marks (NaN: never observed) are put on and taken off at its door, in `snapshot` and
in the constructor.
"""

from collections.abc import Mapping

import numpy as np
import torch

from stages.calibrate.reduce import reduce_groups, reduce_rows
from stages.calibrate.sinks import Place
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
        rows = values.detach().reshape(-1, values.shape[-1])
        if rows.shape[0]:
            amax, total = reduce_rows(rows)
            self._merge(array.key, place, amax, total, rows.shape[0])

    def add_experts(self, array: SiteArray, place: Place, values: torch.Tensor, ends: torch.Tensor) -> None:
        """Merge rows sorted by expert into all experts of one layer, as `reduce_groups` takes them."""
        self._merge(array.key, place, *reduce_groups(values.detach(), ends))

    def set_weight(self, array: SiteArray, place: Place, amax: torch.Tensor) -> None:
        """Set max |W| of one linear (a scalar) or of one projection of all experts of a layer ([experts])."""
        self.weights[array.key][place] = amax.float()

    def _merge(
        self, key: str, place: Place, amax: torch.Tensor, total: torch.Tensor, tokens: torch.Tensor | int
    ) -> None:
        stored = self.amax[key][place]
        torch.maximum(stored, amax, out=stored)  # a computed NaN wins and stays
        self.total[key][place] += total
        self.tokens[key][place] += tokens

    def snapshot(self) -> dict[str, np.ndarray]:
        """Every statistic copied to host memory, in the store's form.

        Never observed: NaN (tokens -1). Observed with a value that is no number: inf, so that it can't be
        mistaken for it.
        """
        arrays = {f"weight_amax/{key}": _host(tensor) for key, tensor in self.weights.items()}
        for key in self.amax:
            amax, total, tokens = _host(self.amax[key]), _host(self.total[key]), _host(self.tokens[key])
            for values in (amax, total):
                values[np.isnan(values)] = np.inf
                values[tokens == 0] = np.nan
            arrays |= {
                f"amax/{key}": amax,
                f"abs_sum/{key}": total,
                f"tokens/{key}": np.where(tokens == 0, -1, tokens),
            }
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


def _host(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.to("cpu", copy=True).numpy()
    return array
