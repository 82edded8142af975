"""How near a quantized weight is to the one it was made from, also where columns or rows were scaled on the
way, as AWQ and SmoothQuant do. Pure sums over pieces of rows; no matrix is kept.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor

NEAR = 0.45
"""The largest relative error (Frobenius) of a weight that was quantized on purpose, by GPTQ too; rounding to
nearest has 0.1 in NVFP4 and 0.03 in FP8, and another random matrix 1.4.
"""
SAME_SIGNS = 0.95
"""Least share of the magnitude whose sign is kept, where rows and columns were scaled."""
UNIFORM = 0.1
"""Columns that are all scaled alike, to this relative spread, were not scaled on purpose."""

Verdict = Literal["near", "scaled", "off"]


@dataclass
class Likeness:
    """Sums over the pieces seen so far. qq, qw, ww: per column, f64 `[K]`, of the quantized weight Q and the
    source's W. of_rows: Σ_i (Σ_j qw)² / Σ_j ww, what Q and W share once each row is scaled.
    """

    qq: Tensor
    qw: Tensor
    ww: Tensor
    of_rows: float = 0.0
    kept: float = 0.0
    signed: float = 0.0

    @classmethod
    def of(cls, columns: int) -> "Likeness":
        """Nothing seen yet."""
        qq, qw, ww = torch.zeros(3, columns, dtype=torch.float64)
        return cls(qq, qw, ww)

    def add(self, quantized: Tensor, source: Tensor) -> None:
        """Some rows, f32 `[rows, K]` both."""
        both, squares = quantized * source, source.square()
        self.qq += quantized.square().sum(0)
        self.qw += both.sum(0)
        self.ww += squares.sum(0)
        rows = squares.sum(1)
        self.of_rows += float((both.sum(1).square() / rows)[rows > 0].double().sum())
        magnitude = quantized.abs()
        self.signed += float(magnitude.sum(1).double().sum())
        self.kept += float(magnitude.mul_(both > 0).sum(1).double().sum())

    def error_beside(self, scales: Tensor | None) -> float:
        """||Q - W D|| / ||Q||. scales: D, f64 `[K]`; None for one. Infinite where Q alone is 0."""
        factors = torch.ones_like(self.qq) if scales is None else scales
        return self._relative(float((self.qq - 2 * factors * self.qw + factors**2 * self.ww).sum()))

    @property
    def error(self) -> float:
        """||Q - W|| / ||Q||."""
        return self.error_beside(None)

    @property
    def column_error(self) -> float:
        """The least ||Q - W D|| / ||Q|| over diagonal D."""
        fitted = self.ww > 0
        return self._relative(float(self.qq.sum() - (self.qw**2 / self.ww)[fitted].sum()))

    @property
    def row_error(self) -> float:
        """The least ||Q - D W|| / ||Q|| over diagonal D."""
        return self._relative(float(self.qq.sum()) - self.of_rows)

    def _relative(self, squared: float) -> float:
        total = float(self.qq.sum())
        return (max(squared, 0.0) / total) ** 0.5 if total else (inf if squared > 0 else 0.0)

    @property
    def factor(self) -> float | None:
        """By what all columns alike are scaled; None where they are scaled differently."""
        used = self.ww > 0
        factors = self.qw[used] / self.ww[used]
        if not len(factors) or float(factors.std(correction=0)) > UNIFORM * abs(float(factors.mean())):
            return None
        return float(factors.mean())

    @property
    def signs(self) -> float:
        """The share of Q's magnitude that has W's sign."""
        return self.kept / self.signed if self.signed else 1.0

    def verdict(self, scales: Tensor | None = None) -> Verdict:
        """Near as it is, or beside columns scaled by D; near once rows or columns, not all alike, are scaled;
        or off.
        """
        if self.error_beside(scales) <= NEAR:
            return "near"
        alike = min(self.column_error, self.row_error) <= NEAR or self.signs >= SAME_SIGNS
        return "scaled" if alike and self.factor is None else "off"
