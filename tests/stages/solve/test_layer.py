"""A layer's groups solved together, on literal weights."""

import pytest
import torch

from stages.formats import NVFP4
from stages.solve.layer import Group, solve_layer
from stages.solve.moments import SiteStatistics


@pytest.mark.parametrize("together", [False, True])
def test_experts_in_one_tensor_share_its_scale(together: bool) -> None:
    weights = torch.stack([torch.full((1, 16), 6.0), torch.full((1, 16), 3.0)])
    site = SiteStatistics(torch.eye(16).repeat(2, 1, 1), torch.ones(2, 16), torch.tensor([1000, 1000]))
    name = "model.layers.0.mlp.experts.E.up_proj"
    group = Group({name: weights}, site, NVFP4, common_basis=True, together=together)
    found = solve_layer(
        {"site": group}, [], scales_by_awq=False, clip=False, sweep=False, damping=0.01
    ).arrays
    assert found[f"{name}@weight_amax"].tolist() == ([6.0, 6.0] if together else [6.0, 3.0])
    # 448 in e4m3 stands for the amax that the tensor's scale is made from.
    codes = found[f"{name}@block_scale"].view(torch.float8_e4m3fn).float().flatten().tolist()
    assert codes == ([448.0, 224.0] if together else [448.0, 448.0])
    assert found[f"{name}@values"].flatten().tolist() == [0x77] * 16


@pytest.mark.parametrize("together", [False, True])
def test_scales_are_searched_under_the_scale_that_experts_share(together: bool) -> None:
    weights = torch.stack([torch.full((1, 16), 6.0), torch.full((1, 16), 2.9)])
    site = SiteStatistics(torch.eye(16).repeat(2, 1, 1), torch.ones(2, 16), torch.tensor([1000, 1000]))
    name = "model.layers.0.mlp.experts.E.up_proj"
    group = Group({name: weights}, site, NVFP4, common_basis=True, together=together)
    found = solve_layer({"site": group}, [], scales_by_awq=False, clip=False, sweep=True, damping=None)
    amax = found.arrays[f"{name}@amax"].flatten()
    # Of what e4m3 holds times 6 / 2688, 4 * 320 comes nearest to 2.9; 6 * 320 is that block's amax.
    meant = torch.tensor([6.0, 6 * 320 * 6 / 2688] if together else [6.0, 2.9])
    torch.testing.assert_close(amax, meant, rtol=1e-6, atol=0)
