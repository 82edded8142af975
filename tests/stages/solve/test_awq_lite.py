"""AWQ lite: the scale formula, its constraints, and the choice of alpha."""

import torch
from torch.testing import assert_close

from stages.formats import INT4_AWQ, NVFP4
from stages.formats.quantized import round_to_nearest
from stages.solve import awq_lite, moments
from stages.solve.awq_lite import Member
from stages.solve.moments import SiteStatistics

EXACT = {"rtol": 0, "atol": 0}


def member(experts: int = 3, rows: int = 16, columns: int = 64, tokens: int = 256, seed: int = 0) -> Member:
    """Inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(experts, tokens, columns, generator=generator)
    inputs[..., ::16] *= 8
    weights = torch.randn(experts, rows, columns, generator=generator)
    return Member(
        weights, SiteStatistics(inputs.mT @ inputs, inputs.abs().sum(1), torch.full((experts,), tokens))
    )


def test_scale_formula():
    # 4^0.5 / 0.25^0.5 = 4 and 1 / 1 = 1; divided by sqrt(4 * 1).
    scale = awq_lite.scale_for(torch.tensor([0.5]), torch.tensor([4.0, 1.0]), torch.tensor([0.25, 1.0]))
    assert_close(scale, torch.tensor([2.0, 0.5]), **EXACT)


def test_scale_of_a_dead_channel_is_clamped():
    scale = awq_lite.scale_for(torch.tensor([1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert_close(scale, torch.tensor([0.01, 100.0]))


def test_weight_share_within_blocks():
    weights = torch.tensor([[[1.0, -2.0, 4.0], [3.0, 3.0, 0.0]]])
    assert_close(awq_lite.weight_share(weights, 2), torch.tensor([[0.75, 1.0, 0.5]]), **EXACT)
    assert_close(awq_lite.weight_share(weights, None), torch.tensor([[0.625, 0.75, 0.5]]), **EXACT)


def test_tie_averages_channels():
    ties = torch.tensor([[0, 2], [1, 3]])
    assert awq_lite.tie(torch.tensor([1.0, 2.0, 5.0, 4.0]), ties).tolist() == [3.0, 3.0, 3.0, 3.0]
    assert awq_lite.tie(torch.tensor([[1.0, 2.0, 5.0, 6.0]]), ties).tolist() == [[3.0, 4.0, 3.0, 4.0]]


def test_losses_are_the_mean_squared_output_error():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(32, 64, generator=generator)
    weights = torch.randn(1, 8, 64, generator=generator)
    site = SiteStatistics((inputs.mT @ inputs)[None], inputs.abs().sum(0)[None], torch.tensor([32]))
    solution = awq_lite.search([Member(weights, site)], NVFP4)
    for index, alpha in enumerate(awq_lite.ALPHAS):
        scale = awq_lite.scale_for(
            torch.tensor([alpha]), inputs.abs().mean(0), awq_lite.weight_share(weights, 16)[0]
        )
        quantized = round_to_nearest(NVFP4, weights * scale).dequantize()[0]
        error = (inputs / scale) @ quantized.T - inputs @ weights[0].T
        assert_close(solution.losses[index], error.square().mean(), rtol=1e-4, atol=0)
    assert solution.alpha == awq_lite.ALPHAS[int(solution.losses.argmin())]


def test_large_channels_get_large_scales():
    solution = awq_lite.search([member()], NVFP4)
    assert solution.losses[0] > solution.losses.min()
    assert solution.scale[::16].min() > solution.scale[1::16].max()
    assert solution.scale.shape == (64,)


def test_members_are_judged_together():
    one, two = member(seed=0), member(seed=1)
    both = awq_lite.search([one, two], NVFP4)
    joined = Member(
        torch.cat([one.weights, two.weights]),
        SiteStatistics(*(torch.cat([getattr(one.site, field), getattr(two.site, field)])
               for field in ("second_moment", "abs_sum", "tokens"))),
    )  # fmt: skip
    assert_close(both.losses, awq_lite.search([joined], NVFP4).losses)
    assert both.alpha == awq_lite.search([joined], NVFP4).alpha


def test_each_expert_alone():
    group = member()
    each = awq_lite.search_each(group, NVFP4)
    assert each.scale.shape == (3, 64)
    for e in range(3):
        site = SiteStatistics(
            group.site.second_moment[e : e + 1], group.site.abs_sum[e : e + 1], group.site.tokens[e : e + 1]
        )
        alone = awq_lite.search([Member(group.weights[e : e + 1], site)], NVFP4)
        assert_close(each.losses[e], alone.losses)
        assert_close(each.scale[e], alone.scale)
        assert each.alpha[e] == alone.alpha


def test_chunks_of_experts_change_nothing(monkeypatch):
    group = member()
    whole = awq_lite.search_each(group, NVFP4)
    monkeypatch.setattr(moments, "CHUNK_ELEMENTS", 2 * 16 * 64)
    assert_close(awq_lite.search_each(group, NVFP4).losses, whole.losses)


def test_an_expert_without_tokens_keeps_scale_one():
    group = member()
    moment, abs_sum, tokens = (
        t.clone() for t in (group.site.second_moment, group.site.abs_sum, group.site.tokens)
    )
    moment[1], abs_sum[1], tokens[1] = 0, 0, 0
    each = awq_lite.search_each(Member(group.weights, SiteStatistics(moment, abs_sum, tokens)), NVFP4)
    assert each.alpha.isnan().tolist() == [False, True, False]
    assert each.scale[1].tolist() == [1.0] * 64
    assert each.losses[1].tolist() == [0.0] * 11


def test_ties_and_snapping_hold_for_the_chosen_scale():
    ties = torch.arange(64).view(2, 32).T
    seen = []

    def snap(scales: torch.Tensor) -> torch.Tensor:
        seen.append(scales)
        return scales.log2().round().exp2()

    solution = awq_lite.search([member()], NVFP4, ties=ties, snap=snap)
    assert [scales.shape for scales in seen] == [(11, 64)]
    assert_close(solution.scale[:32], solution.scale[32:], **EXACT)
    assert (solution.scale.log2() % 1 == 0).all()


def test_partial_blocks_are_weighed_as_blocks_of_their_own():
    weights = torch.zeros(1, 1, 130)
    weights[0, 0, 0], weights[0, 0, 128], weights[0, 0, 129] = 4.0, 1.0, 0.5
    share = awq_lite.weight_share(weights, INT4_AWQ.block_size)
    assert share[0, [0, 1, 128, 129]].tolist() == [1.0, 0.0, 1.0, 0.5]
