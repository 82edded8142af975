"""Folding: a scale per input channel moves out of a weight and into what stands before it.

A consumer's columns are multiplied by s and the rows (or norm weight) that feed it are divided by s, so the
product stays as it was, while the weight that is quantized has the columns a solver asked for.
Nothing remains for an engine to apply.

Pure functions over tensors in hub names. A scale is float32 `[channels]`, positive, and always counts on the
consumer's side: its columns times s, its input statistics over s. `fold_sites` finds where that is possible.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from state.errors import InputError

Kind = Literal["norm", "v_to_o", "up_to_down"]


@dataclass(frozen=True)
class Operand:
    """A hub tensor, or one expert's part of one, that a fold changes.

    Attributes:
        module: hub module it belongs to; expert projections one by one, even where `tensor` holds them all.
        shape: of the whole tensor as stored: `[out, in]`, `[experts, out, in]`; `[out]` for biases and norms.
        expert: index into the first axis of a tensor that holds all experts.
        transposed: the last two axes are stored as `[in, out]`.
        period, first: of every `period` rows, those from `first` on take scale entries, in order. 0 is one
            period over all rows; MLA has one per head (keys, then values), and where gate and up share a
            tensor, up is the end of a single period, or the second of two rows where they are interleaved.
    """

    module: str
    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    period: int = 0
    first: int = 0

    @property
    def rows(self) -> int:
        """Output features."""
        return self.shape[-1] if self.transposed or len(self.shape) == 1 else self.shape[-2]

    @property
    def columns(self) -> int:
        """Input features."""
        return self.shape[-2] if self.transposed else self.shape[-1]


@dataclass(frozen=True)
class FoldSite:
    """One scale vector and every tensor that it touches.

    Attributes:
        name: hub module whose output is divided: a norm, v_proj (MLA: kv_b_proj) or up_proj.
        channels: entries of the scale that are free to choose.
        sources: what is divided by s: the norm's weight, then its bias; or rows of a weight, then its bias.
        consumers: all that reads the divided output; their columns are multiplied, quantized or not.
        plus_one: the norm multiplies by 1 + weight.
        block, repeat: the constraint. Scale entries come in blocks (heads of V), and the consumer's columns
            hold every block `repeat` times in a row (the query heads that share a key-value head).
        degree: of homogeneity, of what stands between source and consumer: 2 for relu², where rows take √s.
    """

    kind: Kind
    name: str
    channels: int
    sources: tuple[Operand, ...]
    consumers: tuple[Operand, ...]
    plus_one: bool = False
    block: int = 1
    repeat: int = 1
    degree: int = 1

    @property
    def divided(self) -> tuple[Operand, ...]:
        """The sources that are divided as they are: all but a norm's weight, which `fold_norm` divides."""
        return self.sources[1:] if self.kind == "norm" else self.sources

    def entries(self, device: torch.device | None = None) -> Tensor:
        """For every input column of the consumers the scale entry it takes: int64 `[columns]`."""
        blocks = torch.arange(self.channels, device=device).reshape(-1, self.block)
        return blocks.repeat_interleave(self.repeat, dim=0).flatten()

    def columns(self, device: torch.device | None = None) -> Tensor:
        """For every scale entry the input columns that take it: int64 `[channels, repeat]`."""
        return self.entries(device).argsort(stable=True).unflatten(0, (self.channels, self.repeat))

    def expand(self, scale: Tensor) -> Tensor:
        """The scale of every input column of the consumers: `[channels]` → `[columns]`."""
        return scale if self.repeat == 1 else scale[self.entries(scale.device)]

    def source_rows(self, part: Operand, scale: Tensor) -> Tensor:
        """What each row of a source is divided by: scale `[..., channels]` → `[..., rows]`; 1 for rows that
        feed nothing of this site.
        """
        periods = part.rows // (part.period or part.rows)
        rows = scale.new_ones(*scale.shape[:-1], periods, part.rows // periods)
        each = self.channels // periods
        rows[..., part.first : part.first + each] = self._root(scale).unflatten(-1, (periods, each))
        return rows.flatten(-2)

    def module_rows(self, part: Operand, scale: Tensor) -> Tensor:
        """As `source_rows`, for the rows of the part's own module: those of an expert's projection take all
        entries, in order, wherever its tensor keeps them.
        """
        return self.source_rows(part, scale) if part.expert is None else self._root(scale)

    def _root(self, scale: Tensor) -> Tensor:
        return scale if self.degree == 1 else scale.pow(1 / self.degree)

    def rounded(self, quantized: Container[str]) -> tuple[str, ...]:
        """Tensors that folding leaves to be rounded to their dtype: biases, and modules not in `quantized`.

        Routers and shared-expert gates, mostly. Norm weights are not among them: `fold_norm` is exact.
        """
        tensors = [
            operand.tensor
            for operand in (*self.divided, *self.consumers)
            if operand.module not in quantized or operand.tensor.endswith(".bias")
        ]
        return tuple(dict.fromkeys(tensors))


@dataclass(frozen=True)
class FoldMap:
    """Every place of a model where a scale can be folded, and why it can't elsewhere.

    sites: by name. impossible: hub module whose input can't be scaled → the reason; it keeps scale 1.
    """

    sites: dict[str, FoldSite] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)

    @cached_property
    def norms(self) -> dict[str, FoldSite]:
        """Norm weight → its site."""
        return {site.sources[0].tensor: site for site in self.sites.values() if site.kind == "norm"}

    @cached_property
    def before(self) -> dict[str, FoldSite]:
        """Hub module → the site that scales its input."""
        return {operand.module: site for site in self.sites.values() for operand in site.consumers}

    @cached_property
    def values(self) -> dict[str, FoldSite]:
        """Hub attention module → the site that divides its V."""
        return {site.name.rpartition(".")[0]: site for site in self.sites.values() if site.kind == "v_to_o"}

    @cached_property
    def _rows(self) -> dict[str, list[tuple[FoldSite, Operand]]]:
        return _by_tensor((site, part) for site in self.sites.values() for part in site.divided)

    @cached_property
    def _columns(self) -> dict[str, list[tuple[FoldSite, Operand]]]:
        return _by_tensor((site, part) for site in self.sites.values() for part in site.consumers)

    def tensor_fold(self, tensor: str, scales: Mapping[str, Tensor]) -> "TensorFold | None":
        """What divides the rows and multiplies the columns of one hub tensor; None when it stays as it is.

        Args:
            scales: site name → scale, for norms the one that `fold_norm` returned; a site not in it keeps 1.
        Raises InputError for a scale that is not positive and finite or has the wrong length.
        """
        rows = [(site, part) for site, part in self._rows.get(tensor, []) if site.name in scales]
        columns = [(site, part) for site, part in self._columns.get(tensor, []) if site.name in scales]
        if not rows and not columns:
            return None
        parts = [(part, site.source_rows(part, checked(site, scales[site.name]))) for site, part in rows]
        inputs = [(part, site.expand(checked(site, scales[site.name]))) for site, part in columns]
        transposed = (rows or columns)[0][1].transposed
        return TensorFold(_stack(parts), _stack(inputs), transposed)

    def module_fold(self, module: str, scales: Mapping[str, Tensor]) -> "TensorFold | None":
        """As `tensor_fold`, for the weight `[out, in]` of one module, whichever tensor holds it."""
        own, row = self.sites.get(module), None
        if own is not None and own.kind != "norm" and module in scales:
            row = own.module_rows(own.sources[0], checked(own, scales[module]))
        column = self.input_factors(module, scales)
        return None if row is None and column is None else TensorFold(row, column)

    def input_factors(self, module: str, scales: Mapping[str, Tensor]) -> Tensor | None:
        """What folding divides a module's input channels by, and so their amax: `[columns]`, or None."""
        site = self.before.get(module)
        if site is None or site.name not in scales:
            return None
        return site.expand(checked(site, scales[site.name]))

    def value_factors(self, attention: str, scales: Mapping[str, Tensor]) -> Tensor | None:
        """What folding divides the V channels of an attention module by: `[kv_heads · head_dim]`, or None."""
        site = self.values.get(attention)
        if site is None or site.name not in scales:
            return None
        return checked(site, scales[site.name])


@dataclass(frozen=True)
class TensorFold:
    """W' = W / row[:, None] * column[None, :], for weights; b' = b / row, for biases.

    row: float32 `[out]` or `[experts, out]`. column: float32 `[in]` or `[experts, in]`. transposed: W is
    stored as `[in, out]`.
    """

    row: Tensor | None
    column: Tensor | None
    transposed: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        """The folded tensor in float32: what is quantized next needs no rounding in between."""
        out, into = (-2, -1) if self.transposed else (-1, -2)
        folded = tensor.float()
        if self.row is not None:
            folded = folded / (self.row if tensor.dim() == self.row.dim() else self.row.unsqueeze(out))
        return folded if self.column is None else folded * self.column.unsqueeze(into)

    def expert(self, number: int) -> "TensorFold":
        """The fold of one expert's slice of a tensor that holds all experts."""
        row = None if self.row is None else self.row[number]
        return TensorFold(row, None if self.column is None else self.column[number], self.transposed)


def fold_norm(weight: Tensor, scale: Tensor, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Divide a norm's weight by a scale, and return the scale that the rounded result stands for.

    Args:
        weight: as stored, `[channels]`; the norm multiplies by it, or by 1 + weight with `plus_one`.
        scale: float32 `[channels]`, wished for.
    Returns the new weight, in the dtype of `weight`, and the float32 scale s' by which the consumers must be
        multiplied: what the norm multiplies by now, times s', is what it multiplied by, however coarse the
        dtype. Where that is impossible (a dead channel, 1 + weight rounded to 0) the weight stays, s' is 1.
    """
    one = float(plus_one)
    gain = weight.double() + one
    rounded = (gain / scale.double() - one).to(weight.dtype)
    snapped = (gain / (rounded.double() + one)).float()
    usable = snapped.isfinite() & (snapped > 0)
    return torch.where(usable, rounded, weight), snapped.masked_fill(~usable, 1.0)


def fold(tensors: Mapping[str, Tensor], site: FoldSite, scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Fold one site.

    Args:
        tensors: hub name → tensor, at least those that the site names.
        scale: float32 `[channels]`.
    Returns the changed tensors and the scale that took effect (`fold_norm`). Norm weights keep their dtype,
        all else is float32.
    Raises InputError for a scale that is not positive and finite or has the wrong length.
    """
    changed = {}
    scale = checked(site, scale)
    if site.kind == "norm":
        weight = site.sources[0].tensor
        changed[weight], scale = fold_norm(tensors[weight], scale, site.plus_one)
    folds = FoldMap({site.name: site})
    for name in dict.fromkeys(operand.tensor for operand in (*site.divided, *site.consumers)):
        part = folds.tensor_fold(name, {site.name: scale})
        assert part is not None
        changed[name] = part.apply(tensors[name])
    return changed, scale


def checked(site: FoldSite, scale: Tensor) -> Tensor:
    """The scale itself. Raises InputError unless it is positive, finite and `[channels]` long."""
    if scale.shape != (site.channels,):
        raise InputError(
            f"the scale of {site.name} has shape {list(scale.shape)}; expected [{site.channels}]"
        )
    wrong = int((~(scale.isfinite() & (scale > 0))).sum())
    if wrong:
        raise InputError(f"the scale of {site.name} has {wrong} entries that are not positive and finite")
    return scale


def _stack(parts: list[tuple[Operand, Tensor]]) -> Tensor | None:
    """One vector for a tensor, or one per expert (1 for experts that have none)."""
    if not parts or parts[0][0].expert is None:
        return parts[0][1] if parts else None
    operand, vector = parts[0]
    stacked = torch.ones(operand.shape[0], vector.shape[0], dtype=vector.dtype, device=vector.device)
    for operand, vector in parts:
        stacked[operand.expert] = vector
    return stacked


def _by_tensor(pairs: Iterator[tuple[FoldSite, Operand]]) -> dict[str, list[tuple[FoldSite, Operand]]]:
    found: dict[str, list[tuple[FoldSite, Operand]]] = {}
    for site, part in pairs:
        found.setdefault(part.tensor, []).append((site, part))
    return found
