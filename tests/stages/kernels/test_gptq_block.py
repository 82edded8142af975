"""One block of GPTQ in every format: the same bits as torch."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, WeightFormat
from stages.solve import gptq

EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize(("format", "block"), [(NVFP4, 16), (INT4_AWQ, 128), (INT8_SQ, 16), (FP8, 16)])
def test_solve_block(device: str, format: WeightFormat, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = 3 * torch.randn(3, 2 * block, 50, generator=generator)
    columns[0, :, 0] = 0
    columns[1, :, 1] *= 1e-4
    factor = 0.3 * torch.randn(3, block, 2 * block, generator=generator)
    factor.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
    shared = columns.abs().amax(dim=(1, 2), keepdim=True) / 2688 if format == NVFP4 else None
    fixed = 0.01 + 0.02 * torch.rand(3, 50, 1, generator=generator) if format in (INT8_SQ, FP8) else None

    def solved(solve, device: str) -> tuple[torch.Tensor, ...]:
        scales = [None if scale is None else scale.to(device) for scale in (shared, fixed)]
        # As a triangular solve leaves it: columns side by side.
        stored = factor.mT.contiguous().to(device).mT
        parts = columns.to(device)[:, :block], stored[..., :block]
        return tuple(found.cpu() for found in solve(*parts, *scales))

    expected = solved(lambda *parts: gptq.solve_block(*parts[:2], format, *parts[2:]), "cpu")
    found = solved(format.gptq_on_gpu, device)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, **EXACT)
