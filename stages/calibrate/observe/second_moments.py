"""Second moments of one decoder layer's inputs: H = Σ xxᵀ over all tokens, per site and per expert."""

from collections.abc import Container

import torch

from stages.calibrate.observe.sinks import Place
from state.layout import SiteArray


class Moments:
    """H of every wanted site that is observed, float32: `[channels, channels]`, per expert where there are
    experts.

    Made anew for each layer: H of a whole model would be larger than the model. Takes rows as `Accumulators`
    does.

    Args:
        wanted: keys of the arrays (`SiteArray.key`) whose second moment a solver needs.
    """

    def __init__(self, wanted: Container[str], device: torch.device) -> None:
        self.wanted, self.device = wanted, device
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, torch.Tensor] = {}

    def add(self, array: SiteArray, place: Place, values: torch.Tensor) -> None:
        """Add the tokens of one site. values: [..., channels]."""
        if array.key in self.wanted:
            rows = values.detach().reshape(-1, values.shape[-1])
            total, tokens = self._sum(array), self.tokens[array.key]
            if array.experts is not None:
                total, tokens = total[place[-1]], tokens[place[-1]]
            _add(total[None], rows, None)
            tokens += len(rows)

    def add_experts(self, array: SiteArray, place: Place, values: torch.Tensor, ends: torch.Tensor) -> None:
        """Add rows sorted by expert, where those of expert e end before ends[e]."""
        if array.key in self.wanted:
            _add(self._sum(array), values.detach(), ends)
            self.tokens[array.key] += ends.diff(prepend=ends.new_zeros(1))

    def of(self, array: SiteArray) -> torch.Tensor:
        """H of an array's sites in this layer, `[experts or 1, channels, channels]`; zeros where nothing was
        seen.
        """
        total = self._sum(array)
        return total if array.experts is not None else total[None]

    def tokens_of(self, array: SiteArray) -> torch.Tensor:
        """How many tokens H is the sum over, int64 `[experts or 1]`."""
        self._sum(array)
        tokens = self.tokens[array.key]
        return tokens if array.experts is not None else tokens[None]

    def is_finite(self) -> bool:
        """Whether every sum fits float32."""
        return all(bool(total.isfinite().all()) for total in self.sums.values())

    def _sum(self, array: SiteArray) -> torch.Tensor:
        if array.key not in self.sums:
            experts = () if array.experts is None else (array.experts,)
            shape = (*experts, array.channels or 0, array.channels or 0)
            self.sums[array.key] = torch.zeros(shape, device=self.device)
            self.tokens[array.key] = torch.zeros(experts, dtype=torch.int64, device=self.device)
        return self.sums[array.key]


def _add(totals: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor | None) -> None:
    """Add xᵀx of each expert's rows, in float32: totals [experts, channels, channels]. ends: None where all
    rows are one site's.
    """
    if rows.is_cuda:
        from stages.kernels.second_moments import add_second_moments

        add_second_moments(totals, rows, ends)
        return
    start = 0
    for total, end in zip(totals, [len(rows)] if ends is None else ends.tolist(), strict=True):
        if end > start:
            own = rows[start:end].float()
            total.addmm_(own.T, own)
        start = end
