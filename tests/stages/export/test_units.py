"""The plan on literal tensors: what becomes of each, in which shard, and what is refused."""

from typing import Any, ClassVar

import pytest

from stages.export.shards import TensorSpec
from stages.export.units import (
    Unit,
    assign_shards,
    check_engine_rules,
    check_widths,
    natural,
    plan_units,
)
from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, W4A8_AWQ, WeightFormat
from stages.model.matrices import StoredMatrix
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe
from state.errors import InputError
from state.source import TensorEntry


def source(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {
        name.replace("__", "."): TensorEntry(name.replace("__", "."), dtype, shape, "model.safetensors", 0, 0)
        for name, (dtype, shape) in tensors.items()
    }


def planned(tensors: dict[str, TensorEntry], plan: QuantizerPlan, **options: Any) -> list[Unit]:
    return plan_units(
        tensors, plan, {name: StoredMatrix(f"{name}.weight") for name in plan.weights}, **options
    )


def quantizers(**fields: Any) -> QuantizerPlan:
    return QuantizerPlan(recipe=Recipe("test", [], "max", {}), **fields)


def test_nvfp4_makes_four_tensors_of_one() -> None:
    plan = quantizers(weights={"up": NVFP4}, inputs={"up": "up.input_quantizer"})
    (unit,) = planned(source(up__weight=("BF16", (8, 32))), plan)
    assert unit.outputs == (
        TensorSpec("up.weight", "U8", (8, 16)),
        TensorSpec("up.weight_scale", "F8_E4M3", (8, 2)),
        TensorSpec("up.weight_scale_2", "F32", ()),
        TensorSpec("up.input_scale", "F32", ()),
    )
    assert unit.nbytes == 8 * 16 + 8 * 2 + 4 + 4


def test_fp8_makes_three() -> None:
    plan = quantizers(weights={"up": FP8}, inputs={"up": "up.input_quantizer"})
    (unit,) = planned(source(up__weight=("F32", (8, 30))), plan)
    assert unit.outputs == (
        TensorSpec("up.weight", "F8_E4M3", (8, 30)),
        TensorSpec("up.weight_scale", "F32", ()),
        TensorSpec("up.input_scale", "F32", ()),
    )


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (INT4_AWQ, {"weight": ("U8", (4, 256)), "weight_scale": ("F32", (8, 2))}),
        (
            W4A8_AWQ,
            {"weight": ("U8", (4, 256)), "weight_scale": ("F32", (8, 2)), "weight_scale_2": ("F32", ())},
        ),
        (INT8_SQ, {"weight": ("I8", (8, 256)), "weight_scale": ("F32", (8,))}),
    ],
)
def test_integer_formats(weight: WeightFormat, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    (unit,) = planned(source(up__weight=("BF16", (8, 256))), quantizers(weights={"up": weight}))
    found = {spec.name.removeprefix("up."): (spec.dtype, spec.shape) for spec in unit.outputs}
    assert found == expected


def test_a_separate_scale_is_a_vector_beside_its_weight() -> None:
    plan = quantizers(weights={"up": NVFP4, "down": NVFP4})
    units = planned(
        source(up__weight=("F32", (8, 32)), down__weight=("F32", (8, 32))),
        plan,
        pre_quant_scale={"up"},
        dtype="F16",
    )
    names = {spec.name: (spec.dtype, spec.shape) for unit in units for spec in unit.outputs}
    assert names["up.pre_quant_scale"] == ("F16", (32,))
    assert "down.pre_quant_scale" not in names


def test_int4_needs_pairs_of_rows() -> None:
    plan = quantizers(weights={"up": INT4_AWQ})
    with pytest.raises(InputError, match=r"up\.weight has 7 rows, of which int4_awq packs two into a byte"):
        planned(source(up__weight=("BF16", (7, 128))), plan)


def test_inputs_left_out_have_no_scale() -> None:
    tensors = source(up__weight=("BF16", (8, 32)))
    by_recipe = planned(tensors, quantizers(weights={"up": NVFP4}))
    by_policy = planned(tensors, quantizers(weights={"up": NVFP4}, inputs={"up": "q"}), weights_only=["up"])
    assert by_recipe == by_policy
    assert "up.input_scale" not in {spec.name for spec in by_recipe[0].outputs}


def test_everything_else_passes_through_and_caches_get_scales() -> None:
    tensors = source(norm__weight=("BF16", (4,)), ids=("I64", (2,)))
    units = planned(tensors, quantizers(kv={"layers.0.self_attn": "fp8"}))
    assert [(unit.source, unit.format) for unit in units] == [
        ("ids", None),
        ("norm.weight", None),
        (None, None),
    ]
    assert [spec for unit in units for spec in unit.outputs] == [
        TensorSpec("ids", "I64", (2,)),
        TensorSpec("norm.weight", "BF16", (4,)),
        TensorSpec("layers.0.self_attn.k_proj.k_scale", "F32", ()),
        TensorSpec("layers.0.self_attn.v_proj.v_scale", "F32", ()),
    ]


def test_natural_order() -> None:
    assert sorted(["layers.10.a", "layers.2.b", "layers.2.a", "embed"], key=natural) == [
        "embed",
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
    ]


class TestShards:
    UNITS = planned(source(a=("U8", (6,)), b=("U8", (4,)), c=("U8", (5,)), d=("U8", (20,))), quantizers())

    def test_one_has_the_plain_name(self) -> None:
        (shard,) = assign_shards(self.UNITS, 35)
        assert shard.file == "model.safetensors" and shard.nbytes == 35

    def test_several_are_filled_in_order_and_named_in_advance(self) -> None:
        shards = assign_shards(self.UNITS, 10)
        assert [(shard.file, [unit.name for unit in shard.units]) for shard in shards] == [
            ("model-00001-of-00003.safetensors", ["a", "b"]),
            ("model-00002-of-00003.safetensors", ["c"]),
            ("model-00003-of-00003.safetensors", ["d"]),
        ]


class TestRefused:
    def test_a_width_that_blocks_do_not_divide(self) -> None:
        with pytest.raises(
            InputError, match=r"up\.weight has 24 input channels, which nvfp4 blocks of 16 do not divide"
        ):
            planned(source(up__weight=("BF16", (8, 24))), quantizers(weights={"up": NVFP4}))

    @pytest.mark.parametrize(("dtype", "shape"), [("I32", (8, 32)), ("BF16", (4, 8, 32)), ("BF16", (32,))])
    def test_weights_that_are_no_float_matrix(self, dtype: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"up\.weight is .*only matrices"):
            planned(source(up__weight=(dtype, shape)), quantizers(weights={"up": NVFP4}))

    def test_a_weight_the_source_does_not_hold(self) -> None:
        with pytest.raises(
            InputError, match=r"'test' quantizes lm_head\.weight, which the source checkpoint does not hold"
        ):
            planned(source(norm__weight=("BF16", (4,))), quantizers(weights={"lm_head": FP8}))

    def test_a_name_taken_already(self) -> None:
        plan = quantizers(weights={"up": NVFP4}, inputs={"up": "q"})
        with pytest.raises(InputError, match=r"already holds up\.input_scale"):
            planned(source(up__weight=("BF16", (8, 32)), up__input_scale=("F32", ())), plan)

    def test_part_of_a_fused_group(self) -> None:
        tensors = source(q__weight=("BF16", (8, 32)), k__weight=("BF16", (8, 32)))
        with pytest.raises(InputError, match=r"differently \(q nvfp4, k unquantized\)"):
            check_engine_rules(quantizers(weights={"q": NVFP4}), [("q", "k")], tensors)
        with pytest.raises(InputError, match=r"differently \(q nvfp4, k fp8\)"):
            check_engine_rules(quantizers(weights={"q": NVFP4, "k": FP8}), [("q", "k")], tensors)
        check_engine_rules(quantizers(weights={"q": NVFP4, "k": NVFP4}), [("q", "k")], tensors)
        check_engine_rules(quantizers(weights={"q": NVFP4}), [("q", "absent")], tensors)

    def test_an_lm_head_not_listed_as_unquantized(self) -> None:
        tensors = source(lm_head__weight=("BF16", (8, 32)), q__weight=("BF16", (8, 32)))
        with pytest.raises(InputError, match="lm_head stays unquantized but is not on the recipe's list"):
            check_engine_rules(quantizers(weights={"q": NVFP4}), [], tensors)
        for pattern in ("lm_head", "lm_*"):
            listed = {"quantization": {"exclude_modules": [pattern]}}
            check_engine_rules(quantizers(weights={"q": NVFP4}, hf_quant_config=listed), [], tensors)

    def test_statistics_of_another_width(self) -> None:
        with pytest.raises(InputError, match="q: the run observed 16 input channels, its weight has 32"):
            check_widths({"q": 16}, {"q": StoredMatrix("q.weight")}, source(q__weight=("BF16", (8, 32))))


class TestExpertsThatStayTogether:
    tensors: ClassVar = {
        name: TensorEntry(name, "BF16", shape, "model.safetensors", 0, 0)
        for name, shape in {"experts.both": (2, 32, 8), "experts.both_bias": (2, 8)}.items()
    }
    matrices: ClassVar = {
        f"experts.{expert}.{leaf}": StoredMatrix("experts.both", expert, True, first, 2, 4)
        for expert in range(2)
        for first, leaf in enumerate(("gate", "up"))
    }

    def units(self, weight: WeightFormat, **options: Any) -> list[Unit]:
        plan = quantizers(
            weights=dict.fromkeys(self.matrices, weight),
            inputs=dict.fromkeys(self.matrices, "experts.both_input_quantizer"),
            together=dict.fromkeys(self.matrices, "experts.both"),
        )
        return plan_units(self.tensors, plan, self.matrices, **options)

    def test_nvfp4_keeps_the_axes_of_the_tensor(self) -> None:
        both, bias = self.units(NVFP4)
        assert both.outputs == (
            TensorSpec("experts.both", "U8", (2, 16, 8)),
            TensorSpec("experts.both_weight_scale", "F8_E4M3", (2, 2, 8)),
            TensorSpec("experts.both_weight_scale_2", "F32", ()),
            TensorSpec("experts.both_input_scale", "F32", ()),
        )
        assert both.matrices == self.matrices and both.leaves["experts.both"] == "weight"
        assert bias == Unit(
            "experts.both_bias", "experts.both_bias", (TensorSpec("experts.both_bias", "BF16", (2, 8)),)
        )

    def test_fp8_has_scales_of_one_number(self) -> None:
        assert self.units(FP8)[0].outputs == (
            TensorSpec("experts.both", "F8_E4M3", (2, 32, 8)),
            TensorSpec("experts.both_weight_scale", "F32", ()),
            TensorSpec("experts.both_input_scale", "F32", ()),
        )

    def test_the_input_scale_is_left_out_for_all_experts_or_none(self) -> None:
        some, every = ([*self.matrices][:2], self.matrices)
        assert "experts.both_input_scale" in self.units(FP8, weights_only=some)[0].leaves
        assert "experts.both_input_scale" not in self.units(FP8, weights_only=every)[0].leaves
