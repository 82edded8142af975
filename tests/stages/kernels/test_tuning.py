"""Kernels of tuned rounding and of inputs, against the torch functions that define them."""

import pytest
import torch
from torch.testing import assert_close

from stages.formats import NVFP4
from stages.formats.quantized import Quantized
from stages.kernels.nvfp4_input import round_blocks
from stages.kernels.tuned_rounding import nvfp4_weights, sign_step
from stages.solve.rounding import MOMENTUM, Latent

EXACT = {"rtol": 0, "atol": 0}
DTYPES = [torch.float16, torch.float32]
if torch.cuda.is_available():  # Triton's interpreter cuts bf16 off, where a GPU rounds
    DTYPES.append(torch.bfloat16)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_rounded_as_on_a_cpu(device: str, dtype: torch.dtype) -> None:
    """Over all of e4m3's range: blocks that are clipped, subnormal, and too small for any scale."""
    x = (drawn(3, 40, 48, seed=0) * torch.logspace(-7, 4, 40)[:, None]).to(dtype)
    x[0, 0] = 0
    scale = torch.tensor(0.01)
    rounded = round_blocks(x.to(device), scale.to(device))
    assert rounded.dtype == dtype
    expected = NVFP4.round_input(x, scale)
    assert_close(rounded.cpu(), expected, **EXACT)
    blocks = expected.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert (blocks == 0).sum() > 3 and (blocks >= 448 * 6 * 0.01).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_latents(device: str, dtype: torch.dtype) -> None:
    latents = drawn(3, 20, 176, seed=1) * 3
    scale = (drawn(3, 20, 11, seed=2).abs() * 100).clamp(min=2**-9).to(torch.float8_e4m3fn)
    shared = torch.tensor([0.001, 0.02, 1.5])
    own = Latent.of(Quantized(NVFP4, latents, scale, shared[:, None, None]), latents)
    weights = nvfp4_weights(latents.to(device), scale.to(device), shared.to(device), dtype)
    assert_close(weights.cpu(), own.weights(dtype), **EXACT)


def test_a_step_of_latents(device: str) -> None:
    latents, gradient = drawn(2, 33, 64, seed=3), drawn(2, 33, 64, seed=4).bfloat16()
    gradient[1, 5] = 0
    own = Latent.of(Quantized(NVFP4, latents, torch.empty(0), None), latents.clone())
    values, momentum = latents.to(device), torch.zeros_like(latents).to(device)
    for rate in (0.25, 0.125):
        own.move(gradient, rate)
        sign_step(values, momentum, gradient.to(device), 1 - MOMENTUM, rate)
        gradient = -3 * gradient
    assert_close(momentum.cpu(), own.momentum)
    assert_close(values.cpu(), own.values, **EXACT)
    assert values[1, 5].cpu().equal(latents[1, 5])
