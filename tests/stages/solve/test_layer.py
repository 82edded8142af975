"""A layer's groups solved together, on literal weights."""

import pytest
import torch

from stages.formats import NVFP4
from stages.solve.layer import Group, solve_layer
from stages.solve.moments import SiteStatistics

NAME = "model.layers.0.mlp.experts.E.up_proj"


def solved(second: float, together: bool, sweep: bool, damping: float | None) -> dict[str, torch.Tensor]:
    """What is found for two experts of one block each, all 6 and all `second`."""
    weights = torch.stack([torch.full((1, 16), 6.0), torch.full((1, 16), second)])
    site = SiteStatistics(torch.eye(16).repeat(2, 1, 1), torch.ones(2, 16), torch.tensor([1000, 1000]))
    group = Group({NAME: weights}, site, NVFP4, common_basis=True, together=together)
    return solve_layer(
        {"site": group}, [], scales_by_awq=False, clip=False, sweep=sweep, damping=damping
    ).arrays


@pytest.mark.parametrize("together", [False, True])
def test_experts_in_one_tensor_share_its_scale(together: bool) -> None:
    found = solved(3.0, together, sweep=False, damping=0.01)
    assert found[f"{NAME}@weight_amax"].tolist() == ([6.0, 6.0] if together else [6.0, 3.0])
    # 448 in e4m3 stands for the amax that the tensor's scale is made from.
    codes = found[f"{NAME}@block_scale"].view(torch.float8_e4m3fn).float().flatten().tolist()
    assert codes == ([448.0, 224.0] if together else [448.0, 448.0])
    assert found[f"{NAME}@values"].flatten().tolist() == [0x77] * 16


@pytest.mark.parametrize("together", [False, True])
def test_scales_are_searched_under_the_scale_that_experts_share(together: bool) -> None:
    amax = solved(2.9, together, sweep=True, damping=None)[f"{NAME}@amax"].flatten()
    # Of what e4m3 holds times 6 / 2688, 4 * 320 comes nearest to 2.9; 6 * 320 is that block's amax.
    meant = torch.tensor([6.0, 6 * 320 * 6 / 2688] if together else [6.0, 2.9])
    torch.testing.assert_close(amax, meant, rtol=1e-6, atol=0)
