import pytest
import torch
from torch import Tensor

from stages.fold.folds import FoldMap, FoldSite, Operand, TensorFold, fold, fold_norm
from state.errors import InputError


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


NORM = FoldSite(
    "norm",
    "norm",
    2,
    (Operand("norm", "norm.weight", (2,)), Operand("norm", "norm.bias", (2,))),
    (Operand("q", "q.weight", (1, 2)), Operand("router", "router.weight", (3, 2))),
)
# Two key-value heads of two channels, each read by two query heads.
VALUES = FoldSite(
    "v_to_o",
    "attn.v",
    4,
    (Operand("attn.v", "attn.v.weight", (4, 1)), Operand("attn.v", "attn.v.bias", (4,))),
    (Operand("attn.o", "attn.o.weight", (1, 8)),),
    block=2,
    repeat=2,
)


class TestFoldNorm:
    def test_bf16_weight_is_rounded_and_the_scale_makes_up_for_it(self) -> None:
        weight, scale = fold_norm(tensor(1.0, 3.0).bfloat16(), tensor(3.0, 0.5), plus_one=False)
        # The bf16 number nearest to 1/3 is 171/512.
        assert weight.dtype == torch.bfloat16
        assert weight.tolist() == [171 / 512, 6.0]
        assert scale.tolist() == tensor(512 / 171, 0.5).tolist()

    def test_plus_one_divides_one_plus_weight(self) -> None:
        weight, scale = fold_norm(tensor(0.5, -0.5), tensor(2.0, 0.25), plus_one=True)
        assert weight.tolist() == [-0.25, 1.0]
        assert scale.tolist() == [2.0, 0.25]

    def test_plus_one_near_minus_one_takes_the_nearest_gain_that_bf16_holds(self) -> None:
        # 1 + w is 3/256 here and steps by 1/256: a third of it exists, half of it is rounded to even.
        weight, scale = fold_norm(tensor(-253 / 256, -253 / 256).bfloat16(), tensor(3.0, 2.0), plus_one=True)
        assert weight.tolist() == [-255 / 256, -254 / 256]
        assert scale.tolist() == [3.0, 1.5]

    @pytest.mark.parametrize(
        ("weight", "plus_one"),
        [(0.0, False), (-1.0, True), (-255 / 256, True)],
        ids=["dead", "dead+1", "to zero"],
    )
    def test_a_gain_that_can_not_be_divided_stays(self, weight: float, plus_one: bool) -> None:
        stored, scale = fold_norm(tensor(weight).bfloat16(), tensor(4.0), plus_one)
        assert stored.tolist() == [weight]
        assert scale.tolist() == [1.0]

    def test_gain_is_kept_to_float32_rounding_and_a_snapped_scale_stays(self) -> None:
        generator = torch.Generator().manual_seed(0)
        stored = (torch.rand(4096, generator=generator) - 0.5).bfloat16()
        wished = torch.exp2(6 * torch.rand(4096, generator=generator) - 3)
        for plus_one in (False, True):
            weight, scale = fold_norm(stored, wished, plus_one)
            gain = (weight.double() + plus_one * 1.0) * scale.double()
            torch.testing.assert_close(gain, stored.double() + plus_one * 1.0, rtol=2**-23, atol=0)
            assert (scale != 1).sum() > 4000
            again, same = fold_norm(stored, scale, plus_one)
            assert torch.equal(again, weight)
            assert torch.equal(same, scale)


class TestFold:
    def test_norm_divides_weight_and_bias_and_multiplies_every_consumer(self) -> None:
        tensors = {
            "norm.weight": tensor(1.0, 2.0),
            "norm.bias": tensor(4.0, 4.0),
            "q.weight": tensor(1.0, 1.0).reshape(1, 2),
            "router.weight": torch.ones(3, 2),
            "other.weight": torch.ones(2, 2),
        }
        changed, scale = fold(tensors, NORM, tensor(2.0, 4.0))
        assert {name: value.tolist() for name, value in changed.items()} == {
            "norm.weight": [0.5, 0.5],
            "norm.bias": [2.0, 1.0],
            "q.weight": [[2.0, 4.0]],
            "router.weight": [[2.0, 4.0]] * 3,
        }
        assert scale.tolist() == [2.0, 4.0]

    def test_consumers_take_the_snapped_scale_and_are_not_rounded(self) -> None:
        site = FoldSite("norm", "norm", 1, (Operand("norm", "n", (1,)),), (Operand("q", "q", (1, 1)),))
        changed, scale = fold(
            {"n": tensor(1.0).bfloat16(), "q": torch.ones(1, 1).bfloat16()}, site, tensor(3.0)
        )
        assert changed["n"].dtype == torch.bfloat16
        assert changed["q"].dtype == torch.float32
        assert changed["q"].item() == scale.item() == tensor(512 / 171).item()

    def test_values_share_a_scale_over_the_query_heads_of_a_key_value_head(self) -> None:
        tensors = {
            "attn.v.weight": torch.ones(4, 1),
            "attn.v.bias": torch.ones(4),
            "attn.o.weight": torch.ones(1, 8),
        }
        changed, _ = fold(tensors, VALUES, tensor(1.0, 2.0, 4.0, 8.0))
        assert changed["attn.v.weight"].tolist() == [[1.0], [0.5], [0.25], [0.125]]
        assert changed["attn.v.bias"].tolist() == [1.0, 0.5, 0.25, 0.125]
        assert changed["attn.o.weight"].tolist() == [[1.0, 2.0, 1.0, 2.0, 4.0, 8.0, 4.0, 8.0]]

    def test_mla_divides_only_the_rows_of_v_in_each_head(self) -> None:
        # Two heads of one key row and two value rows.
        source = Operand("kv_b", "kv_b", (6, 1), period=3, first=1)
        site = FoldSite("v_to_o", "kv_b", 4, (source,), (Operand("o", "o", (1, 4)),), block=2)
        changed, _ = fold(
            {"kv_b": torch.ones(6, 1), "o": torch.ones(1, 4)}, site, tensor(2.0, 4.0, 8.0, 16.0)
        )
        assert changed["kv_b"].flatten().tolist() == [1.0, 0.5, 0.25, 1.0, 0.125, 0.0625]
        assert changed["o"].tolist() == [[2.0, 4.0, 8.0, 16.0]]

    def test_relu_squared_takes_the_root_in_the_rows(self) -> None:
        site = FoldSite(
            "up_to_down",
            "up",
            2,
            (Operand("up", "up", (2, 1)),),
            (Operand("down", "down", (1, 2)),),
            degree=2,
        )
        changed, _ = fold({"up": torch.ones(2, 1), "down": torch.ones(1, 2)}, site, tensor(4.0, 16.0))
        assert changed["up"].tolist() == [[0.5], [0.25]]
        assert changed["down"].tolist() == [[4.0, 16.0]]

    @pytest.mark.parametrize(
        ("scale", "message"),
        [
            (tensor(1.0, 0.0), "1 entries that are not positive and finite"),
            (tensor(float("nan"), float("inf")), "2 entries that are not positive and finite"),
            (tensor(1.0), r"the scale of norm has shape \[1\]; expected \[2\]"),
        ],
    )
    def test_unusable_scales_are_refused(self, scale: Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            fold({}, NORM, scale)


def expert_sites(transposed: bool) -> FoldMap:
    """Two experts of one channel in, one between (gate above up), one out, in one tensor each."""
    gate_up = (2, 1, 2) if transposed else (2, 2, 1)
    sites = {}
    for expert in range(2):
        up = Operand(f"{expert}.up", "gate_up", gate_up, expert, transposed, period=2, first=1)
        down = Operand(f"{expert}.down", "down", (2, 1, 1), expert, transposed)
        sites[f"{expert}.up"] = FoldSite("up_to_down", f"{expert}.up", 1, (up,), (down,))
    return FoldMap(sites)


class TestTensorFold:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_experts_in_one_tensor_have_their_own_rows(self, transposed: bool) -> None:
        part = expert_sites(transposed).tensor_fold("gate_up", {"0.up": tensor(2.0), "1.up": tensor(4.0)})
        assert part is not None
        assert part.row is not None
        assert part.row.tolist() == [[1.0, 2.0], [1.0, 4.0]]
        whole = torch.ones(2, 1, 2) if transposed else torch.ones(2, 2, 1)
        assert part.apply(whole).flatten(1).tolist() == [[1.0, 0.5], [1.0, 0.25]]
        assert part.expert(1).apply(whole[1]).flatten().tolist() == [1.0, 0.25]

    def test_an_expert_without_a_scale_stays(self) -> None:
        part = expert_sites(False).tensor_fold("down", {"1.up": tensor(4.0)})
        assert part is not None
        assert part.apply(torch.ones(2, 1, 1)).flatten().tolist() == [1.0, 4.0]

    def test_rows_and_columns_of_one_tensor(self) -> None:
        part = TensorFold(tensor(2.0, 4.0), tensor(1.0, 10.0))
        assert part.apply(torch.ones(2, 2)).tolist() == [[0.5, 5.0], [0.25, 2.5]]

    def test_a_transposed_tensor_has_its_inputs_on_the_first_axis(self) -> None:
        part = TensorFold(None, tensor(1.0, 10.0), transposed=True)
        assert part.apply(torch.ones(1, 2, 3)).tolist() == [[[1.0] * 3, [10.0] * 3]]


class TestFoldMap:
    folds = FoldMap({"norm": NORM, "attn.v": VALUES})

    def test_tensors_without_a_scale_are_left_alone(self) -> None:
        scales = {"norm": tensor(2.0, 4.0)}
        assert self.folds.tensor_fold("other.weight", scales) is None
        assert self.folds.tensor_fold("attn.o.weight", scales) is None
        assert self.folds.tensor_fold("norm.weight", scales) is None

    def test_input_statistics_are_divided_by_the_scale_of_each_column(self) -> None:
        factors = self.folds.input_factors("attn.o", {"attn.v": tensor(1.0, 2.0, 4.0, 8.0)})
        assert factors is not None
        assert factors.tolist() == [1.0, 2.0, 1.0, 2.0, 4.0, 8.0, 4.0, 8.0]
        assert self.folds.input_factors("attn.o", {"norm": tensor(2.0, 4.0)}) is None
        assert self.folds.input_factors("attn.v", {"attn.v": tensor(1.0, 2.0, 4.0, 8.0)}) is None

    def test_values_are_divided_entry_by_entry(self) -> None:
        factors = self.folds.value_factors("attn", {"attn.v": tensor(1.0, 2.0, 4.0, 8.0)})
        assert factors is not None
        assert factors.tolist() == [1.0, 2.0, 4.0, 8.0]
        assert self.folds.value_factors("attn", {}) is None

    def test_entries_say_which_columns_are_tied(self) -> None:
        assert VALUES.entries().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
        assert NORM.entries().tolist() == [0, 1]
        assert VALUES.columns().tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]

    def test_what_is_not_quantized_is_rounded(self) -> None:
        assert NORM.rounded({"q"}) == ("norm.bias", "router.weight")
        assert VALUES.rounded({"attn.v", "attn.o"}) == ("attn.v.bias",)
