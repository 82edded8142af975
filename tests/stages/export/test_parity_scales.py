"""Parity with modelopt's exporter where block scales are searched.

modelopt judges candidates by a kernel that needs a GPU. Here the same arithmetic runs in torch; its own
calibrators generate the candidates, choose, and its exporter writes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stages.export import support
from tests.stages.export.test_parity import assert_parity

RECIPES = ("nvfp4_w4a4_weight_mse_fp8_sweep", "nvfp4_four_over_six")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel
    from modelopt.torch.quantization import tensor_quant

    kernels = tensor_quant.triton_kernel
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

    def fake_quant(
        x: Tensor, amax: Tensor, global_amax: Any, quantize: bool, largest: float, dtype: torch.dtype
    ) -> Tensor:
        scale = fp4_kernel.compute_fp4_scales(amax, global_amax, quantize, largest).reshape(-1, 1)
        blocks = x.float().reshape(len(scale), -1)
        safe = torch.where(scale == 0, 1.0, scale)
        quotients = blocks.abs() / safe
        codes = torch.searchsorted(bounds, quotients)
        codes += (quotients[..., None] == bounds[[1, 3, 5]]).any(-1)
        found = torch.where(scale == 0, 0.0, values[codes] * safe * torch.where(blocks >= 0, 1.0, -1.0))
        return found.to(dtype).view(x.shape)

    monkeypatch.setattr(kernels, "IS_AVAILABLE", True, raising=False)
    monkeypatch.setattr(kernels, "static_blockwise_fp4_fake_quant", fake_quant, raising=False)
    yield


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_searched_scales(recipe: str, family: str, tmp_path: Path, on_cpu: None) -> None:
    model = support.make_model(tmp_path / "model", support.config_of(family))
    run = support.make_run(tmp_path / "run", model, support.make_text(tmp_path / "text.jsonl"))
    assert_parity(model, run, recipe, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_scales_of_a_trained_mixture(recipe: str, shared: Path, tmp_path: Path, on_cpu: None) -> None:
    model = shared / "models" / "code-moe"
    run = support.make_run(tmp_path / "run", model, shared / "data" / "code.jsonl", samples=4, seq=64)
    assert_parity(model, run, recipe, tmp_path)
