"""How near a quantized weight is to the one it was made from, also where columns or rows were scaled on the
way, as AWQ and SmoothQuant do. Pure sums over pieces of rows; no matrix is kept.
"""

from dataclasses import dataclass
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
        q, w = quantized.double(), source.double()
        both = q * w
        self.qq += (q * q).sum(0)
        self.qw += both.sum(0)
        self.ww += (w * w).sum(0)
        rows = (w * w).sum(1)
        self.of_rows += float((both.sum(1) ** 2 / rows)[rows > 0].sum())
        used = (q.abs() * (w != 0)).sum()
        self.kept += float((q.abs() * (both > 0)).sum())
        self.signed += float(used)

    @property
    def error(self) -> float:
        """||Q - W|| / ||W||."""
        total = float(self.ww.sum())
        squared = float((self.qq - 2 * self.qw + self.ww).sum())
        return (max(squared, 0.0) / total) ** 0.5 if total else float(self.qq.sum() > 0)

    @property
    def scaled_error(self) -> float:
        """The least of ||Q - W D|| / ||Q|| and ||Q - D W|| / ||Q|| over diagonal D."""
        total = float(self.qq.sum())
        if not total:
            return 1.0
        columns = float((self.qw**2 / self.ww)[self.ww > 0].sum())
        return (max(total - max(columns, self.of_rows), 0.0) / total) ** 0.5

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

    @property
    def verdict(self) -> Verdict:
        """Near as it is; near once rows or columns, not all alike, are scaled; or off."""
        if self.error <= NEAR:
            return "near"
        alike = self.scaled_error <= NEAR or self.signs >= SAME_SIGNS
        return "scaled" if alike and self.factor is None else "off"
