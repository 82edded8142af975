"""Every rule of unification on literal tensors."""

import math
import re
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from stages.unify import (
    AGREEMENT,
    DEAD_AMAX,
    DEAD_BELOW,
    ExpertFamily,
    Policies,
    PolicyUse,
    connected,
    floor_dead,
    merge,
    unify,
)
from state.errors import InputError

NEVER = torch.tensor(math.nan)
GATE, UP, DOWN = "experts.{}.gate", "experts.{}.up", "experts.{}.down"


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def values(amax: dict[str, Tensor | None]) -> dict[str, float | None]:
    return {name: None if value is None else value.item() for name, value in amax.items()}


class TestMerge:
    def test_scalars_give_their_max(self) -> None:
        assert merge([scalar(2.0), scalar(3.0), scalar(1.0)]).equal(scalar(3.0))

    def test_vectors_give_the_elementwise_max(self) -> None:
        merged = merge([torch.tensor([1.0, 5.0, 0.0]), torch.tensor([2.0, 4.0, 0.0])])
        assert merged.equal(torch.tensor([2.0, 5.0, 0.0]))

    def test_a_scalar_counts_for_every_channel_of_a_vector(self) -> None:
        merged = merge([torch.tensor([1.0, 5.0, 0.0]), scalar(2.0)])
        assert merged.equal(torch.tensor([2.0, 5.0, 2.0]))

    def test_other_widths_are_refused(self) -> None:
        with pytest.raises(InputError, match=re.escape("different channel counts: [2, 3]")):
            merge([torch.zeros(2), torch.zeros(3)])


class TestGroups:
    def test_fused_members_share_the_larger_value(self) -> None:
        found = unify({"q": scalar(2.0), "k": scalar(7.0), "o": scalar(1.0)}, engine_fused=[("q", "k")])
        assert values(found.amax) == {"q": 7.0, "k": 7.0, "o": 1.0}
        assert found.uses == ()

    def test_vectors_are_merged_by_channel_and_stored_as_a_scalar(self) -> None:
        found = unify(
            {"q": torch.tensor([1.0, 6.0]), "k": torch.tensor([4.0, 2.0])}, engine_fused=[("q", "k")]
        )
        assert values(found.amax) == {"q": 6.0, "k": 6.0}
        assert found.amax["q"].shape == ()  # type: ignore[union-attr]

    def test_groups_that_overlap_are_one(self) -> None:
        found = unify(
            {"a": scalar(1.0), "b": scalar(1.0), "c": scalar(9.0)},
            same_input=[("a", "b")],
            engine_fused=[("b", "c")],
        )
        assert values(found.amax) == {"a": 9.0, "b": 9.0, "c": 9.0}

    def test_a_member_never_observed_takes_the_value_of_its_group(self) -> None:
        found = unify({"q": scalar(2.0), "k": NEVER}, same_input=[("q", "k")])
        assert values(found.amax) == {"q": 2.0, "k": 2.0}
        assert [(use.policy, use.quantizers) for use in found.uses] == [("unobserved=group", ("k",))]

    def test_nothing_observed_outside_a_group_is_an_error(self) -> None:
        with pytest.raises(InputError, match=r"^o_proj: never observed"):
            unify({"q": scalar(2.0), "o_proj": NEVER})

    def test_names_outside_the_observations_are_passed_over(self) -> None:
        found = unify({"q": scalar(2.0)}, same_input=[("router", "q")], engine_fused=[("q", "k")])
        assert values(found.amax) == {"q": 2.0}

    def test_connected_keeps_the_order_of_names(self) -> None:
        groups = connected(["d", "c", "b", "a"], [("a", "c"), ("c", "d")])
        assert groups == {"d": ("d", "c", "a"), "c": ("d", "c", "a"), "a": ("d", "c", "a"), "b": ("b",)}


class TestConflict:
    def test_values_within_a_bfloat16_step_agree(self) -> None:
        close = 1.0 - AGREEMENT
        found = unify({"q": scalar(1.0), "k": scalar(close)}, same_input=[("q", "k")])
        assert values(found.amax) == {"q": 1.0, "k": 1.0}
        assert found.uses == ()

    def test_further_apart_takes_the_max_and_says_so(self) -> None:
        found = unify({"q": scalar(1.0), "k": scalar(0.75)}, same_input=[("q", "k")])
        assert values(found.amax) == {"q": 1.0, "k": 1.0}
        assert found.uses == (
            PolicyUse("conflict=max", ("q", "k"), "differ by 0.25 of the larger; took the max"),
        )

    def test_one_channel_apart_is_a_conflict(self) -> None:
        found = unify({"q": torch.tensor([8.0, 1.0]), "k": torch.tensor([8.0, 0.5])}, same_input=[("q", "k")])
        assert [use.policy for use in found.uses] == ["conflict=max"]

    def test_scalar_and_vector_are_compared_by_their_max(self) -> None:
        found = unify({"q": torch.tensor([8.0, 1.0]), "k": scalar(8.0)}, same_input=[("q", "k")])
        assert found.uses == ()

    def test_channels_dead_on_both_sides_agree(self) -> None:
        found = unify({"q": torch.tensor([0.0, 1.0]), "k": torch.tensor([0.0, 1.0])}, same_input=[("q", "k")])
        assert found.uses == ()

    def test_members_fused_by_name_alone_may_differ(self) -> None:
        found = unify({"w1": scalar(1.0), "w3": scalar(4.0)}, engine_fused=[("w1", "w3")])
        assert found.uses == ()

    def test_error(self) -> None:
        with pytest.raises(InputError, match=r"^q, k saw one tensor but .* differ by 0\.25 .*--conflict max"):
            unify(
                {"q": scalar(1.0), "k": scalar(0.75)},
                same_input=[("q", "k")],
                policies=Policies(conflict="error"),
            )


class TestNonFinite:
    @pytest.mark.parametrize(
        ("amax", "shown"),
        [
            (torch.tensor([1.0, math.nan]), "1 of 2 amax values .*first: nan"),
            (torch.tensor([1.0, math.inf, math.inf]), "2 of 3 amax values .*first: inf"),
            (scalar(math.inf), "1 of 1 amax values .*first: inf"),
            (scalar(-1.0), "1 of 1 amax values .*first: -1"),
        ],
    )
    def test_is_always_an_error_that_names_the_quantizer(self, amax: Tensor, shown: str) -> None:
        with pytest.raises(InputError, match=f"^layers.3.q_proj: {shown}"):
            unify({"layers.3.q_proj": amax, "k": scalar(1.0)}, same_input=[("layers.3.q_proj", "k")])

    def test_matrices_are_refused(self) -> None:
        with pytest.raises(InputError, match=re.escape("q: amax has shape [1, 4]")):
            unify({"q": torch.ones(1, 4)})


class TestDead:
    def test_floor_puts_unit_amax_and_says_so(self) -> None:
        found = unify({"q": scalar(0.0), "o": scalar(3.0)})
        assert values(found.amax) == {"q": DEAD_AMAX, "o": 3.0}
        assert DEAD_AMAX == 1.0
        assert [(use.policy, use.quantizers) for use in found.uses] == [("dead=floor", ("q",))]

    def test_a_vector_is_dead_only_as_a_whole(self) -> None:
        found = unify({"q": torch.tensor([0.0, 0.5]), "o": torch.zeros(2)})
        assert values(found.amax) == {"q": 0.5, "o": 1.0}

    def test_an_amax_without_a_finite_reciprocal_scale_is_dead(self) -> None:
        floored, _ = floor_dead({"low": scalar(DEAD_BELOW * 0.5), "edge": scalar(DEAD_BELOW)}, "floor")
        assert values(floored) == {"low": 1.0, "edge": pytest.approx(DEAD_BELOW, rel=1e-6)}
        edge = floored["edge"]
        assert edge is not None and bool((1 / (edge / (6 * 448))).isfinite())

    def test_error(self) -> None:
        with pytest.raises(InputError, match=r"^q: amax is zero .*--dead floor"):
            unify({"q": scalar(0.0)}, policies=Policies(dead="error"))


def mixture(fused: bool, *, gates: list[Tensor], ups: list[Tensor]) -> dict:
    """Arguments of unify for the first projections of one layer's experts."""
    names = [[pattern.format(expert) for expert in range(len(gates))] for pattern in (GATE, UP)]
    return {
        "observed": dict(zip(names[0], gates, strict=True)) | dict(zip(names[1], ups, strict=True)),
        "same_input": list(zip(*names, strict=True)),
        "engine_fused": list(zip(*names, strict=True)),
        "families": [
            ExpertFamily("experts.E.gate", tuple(names[0]), fused),
            ExpertFamily("experts.E.up", tuple(names[1]), fused),
        ],
    }


WITH_ZEROS = [
    torch.tensor([0.0, 3.0, 0.0, 1.5]),
    torch.full((4,), math.nan),
    torch.tensor([2.0, 0.0, 0.0, 5.0]),
]


class TestExperts:
    """Vector amax on gate and up, some channels at zero, and an expert that no token reached."""

    def test_fused_experts_share_one_scale_per_layer(self) -> None:
        found = unify(**mixture(True, gates=WITH_ZEROS, ups=WITH_ZEROS))
        assert set(values(found.amax).values()) == {5.0}
        assert [(use.policy, use.quantizers) for use in found.uses] == [
            ("unseen=layer", ("experts.1.gate",)),
            ("expert_input_scale=layer", ("experts.0.gate",)),
            ("unseen=layer", ("experts.1.up",)),
            ("expert_input_scale=layer", ("experts.0.up",)),
        ]

    def test_kept_apart_each_expert_has_its_own_and_gate_matches_up(self) -> None:
        apart = Policies(expert_input_scale="expert")
        found = unify(**mixture(True, gates=WITH_ZEROS, ups=WITH_ZEROS), policies=apart)
        assert values(found.amax) == {
            "experts.0.gate": 3.0,
            "experts.1.gate": 5.0,
            "experts.2.gate": 5.0,
            "experts.0.up": 3.0,
            "experts.1.up": 5.0,
            "experts.2.up": 5.0,
        }
        assert "expert_input_scale=expert" in {use.policy for use in found.uses}

    def test_experts_as_separate_linears_are_apart_by_default(self) -> None:
        found = unify(**mixture(False, gates=WITH_ZEROS, ups=WITH_ZEROS))
        assert values(found.amax)["experts.0.gate"] == 3.0
        assert values(found.amax)["experts.1.up"] == 5.0
        assert [use.policy for use in found.uses] == ["unseen=layer", "unseen=layer"]

    def test_gate_observed_and_up_not(self) -> None:
        found = unify(**mixture(False, gates=[scalar(2.0), scalar(4.0)], ups=[NEVER, scalar(4.0)]))
        assert values(found.amax) == {
            "experts.0.gate": 2.0,
            "experts.1.gate": 4.0,
            "experts.0.up": 2.0,
            "experts.1.up": 4.0,
        }
        assert [(use.policy, use.quantizers) for use in found.uses] == [
            ("unobserved=group", ("experts.0.up",))
        ]

    @pytest.mark.parametrize("fused", [True, False])
    def test_weights_only_leaves_the_unseen_expert_without_a_value(self, fused: bool) -> None:
        found = unify(
            **mixture(fused, gates=WITH_ZEROS, ups=WITH_ZEROS),
            policies=Policies(unseen="weights-only"),
        )
        assert found.amax["experts.1.gate"] is None and found.amax["experts.1.up"] is None
        assert found.amax["experts.0.gate"] is not None
        assert [use.quantizers for use in found.uses if use.policy == "unseen=weights-only"] == [
            ("experts.1.gate",),
            ("experts.1.up",),
        ]

    def test_unseen_error(self) -> None:
        with pytest.raises(InputError, match=r"^experts.1.gate: no token .*--unseen layer"):
            unify(**mixture(True, gates=WITH_ZEROS, ups=WITH_ZEROS), policies=Policies(unseen="error"))

    def test_a_layer_without_any_token_is_an_error(self) -> None:
        with pytest.raises(InputError, match=r"any expert of experts.E.gate.*--unseen weights-only"):
            unify(**mixture(True, gates=[NEVER, NEVER], ups=[NEVER, NEVER]))

    def test_a_dead_expert_is_not_an_unseen_one(self) -> None:
        found = unify(
            **mixture(False, gates=[torch.zeros(4), scalar(2.0)], ups=[torch.zeros(4), scalar(2.0)])
        )
        assert values(found.amax)["experts.0.gate"] == DEAD_AMAX
        assert [(use.policy, use.quantizers) for use in found.uses] == [
            ("dead=floor", ("experts.0.gate", "experts.0.up"))
        ]


class TestExpertsInOneTensor:
    observed: ClassVar = {"experts.0.up": scalar(1.0), "experts.1.up": NEVER}
    family = ExpertFamily("experts.E.up", tuple(observed), fused=True, together=True)

    def test_they_share_the_largest(self) -> None:
        found = unify(self.observed, families=[self.family])
        assert values(found.amax) == {"experts.0.up": 1.0, "experts.1.up": 1.0}

    @pytest.mark.parametrize(
        ("policies", "option"),
        [
            (Policies(expert_input_scale="expert"), "--expert-input-scale expert"),
            (Policies(unseen="weights-only"), "--unseen weights-only"),
        ],
    )
    def test_scales_that_differ_are_refused(self, policies: Policies, option: str) -> None:
        with pytest.raises(InputError, match=rf"{option} would give the experts of experts\.E\.up"):
            unify(self.observed, families=[self.family], policies=policies)

    def test_none_may_have_any(self) -> None:
        policies = Policies(unseen="weights-only")
        found = unify(dict.fromkeys(self.observed, NEVER), families=[self.family], policies=policies)
        assert values(found.amax) == dict.fromkeys(self.observed)
