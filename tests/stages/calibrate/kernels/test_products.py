"""Inner products of matrices."""

import torch
from torch.testing import assert_close

from stages.calibrate.kernels import products


def test_literal_matrices(device: str) -> None:
    a = torch.tensor([[[1.0, 2.0]], [[-3.0, 0.5]]], device=device)
    b = torch.tensor([[[4.0, -1.0]], [[2.0, 2.0]]], device=device)
    assert products.sum_products(a, b).tolist() == [2.0, -5.0]


def test_matrices_of_several_parts(device: str) -> None:
    a, b = torch.randn(2, 3, 130, 300, generator=torch.Generator().manual_seed(0)).to(device)
    assert a[0].numel() > products.TILE * products.TILES
    assert_close(products.sum_products(a, b), (a.double() * b.double()).sum(dim=(1, 2)).float())
