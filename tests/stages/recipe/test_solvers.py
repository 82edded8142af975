"""Solvers as recipes ask for them, and the names of their arrays."""

from dataclasses import asdict
from typing import Any

import pytest

from stages.formats import FP8, INT4_AWQ, INT8_SQ, NVFP4, WeightFormat
from stages.recipe import solvers
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe, resolve
from stages.recipe.solvers import array_name, solver_of, stacked_name
from stages.settings import ExportSettings
from stages.unify import Policies
from state.errors import InputError


def plan(
    method: str, weights: dict[str, WeightFormat] | None = None, awq_first: bool = False, **options: Any
) -> QuantizerPlan:
    recipe = Recipe("test", [], method, options, awq_first)
    return QuantizerPlan(recipe, {"layers.0.up": NVFP4} if weights is None else weights)


def solver_id(*args: Any, **kwargs: Any) -> str:
    solver = solver_of(plan(*args, **kwargs))
    assert solver is not None
    return solver.id


def test_max_needs_no_solver() -> None:
    assert solver_of(plan("max")) is None


def test_what_a_recipe_asks_for() -> None:
    gptq = solver_of(plan("gptq", perc_damp=0.05, layerwise={"enable": True}))
    assert gptq is not None
    assert (gptq.method, gptq.needs_pass, gptq.damping) == ("gptq", True, 0.05)
    smooth = solver_of(plan("smoothquant", {"up": INT8_SQ}, alpha=0.5))
    assert smooth is not None
    assert (smooth.method, smooth.needs_pass, smooth.alpha) == ("smoothquant", False, 0.5)


def test_the_id_follows_what_changes_the_result() -> None:
    plain = solver_id("awq_lite")
    assert plain.startswith("awq_lite-") and len(plain) == len("awq_lite-") + 8
    assert solver_id("awq_lite", alpha_step=0.1, debug=True) == plain
    assert solver_id("gptq", max_co_batch_size=7) == solver_id("gptq")
    others = [
        solver_id("awq_full"),
        solver_id("awq_lite", {"layers.0.up": INT4_AWQ}),
        solver_id("awq_lite", {"layers.0.up": NVFP4, "layers.1.up": NVFP4}),
        solver_id("gptq"),
        solver_id("gptq", perc_damp=0.1),
        solver_id("gptq", awq_first=True),
        solver_id("local_hessian"),
    ]
    assert len({plain, *others}) == len(others) + 1


def test_gptqs_id_follows_the_policies_under_which_inputs_are_unified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where inputs are rounded, and where it sees what leaves quantized layers."""

    def ids() -> list[str]:
        weights: dict[str, WeightFormat] = {"layers.0.up": NVFP4}
        both = QuantizerPlan(Recipe("test", [], "gptq", {}), weights, {"layers.0.up": "up.input_quantizer"})
        solver = solver_of(both)
        assert solver is not None and solver.two_streams
        return [solver.id, solver_id("gptq"), solver_id("gptq", awq_first=True), solver_id("awq_lite")]

    before = ids()
    monkeypatch.setattr(solvers, "INPUT_POLICIES", Policies(expert_input_scale="expert"))
    changed = [one != other for one, other in zip(before, ids(), strict=True)]
    assert changed == [True, False, False, False] and len(set(before)) == 4


def test_inputs_are_unified_as_an_export_does_that_names_no_policy() -> None:
    fields = ("unseen", "conflict", "dead", "expert_input_scale")
    defaults = {name: ExportSettings.model_fields[name].default for name in fields}
    assert asdict(solvers.INPUT_POLICIES) == defaults


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plan("awq_lite", alpha_step=0.2), r"alpha_step=0.2; only 0.1 is supported"),
        (plan("gptq", awq_first=True, alpha_step=0.2), r"alpha_step=0.2; only 0.1 is supported"),
        (plan("awq_clip", zero_point=True), r"zero_point=True; it is not supported"),
        (plan("local_hessian", fp8_scale_sweep=False), r"fp8_scale_sweep=False; only True is supported"),
        (plan("local_hessian", block_size=32), r"block_size=32; only 16 is supported"),
        (
            plan("local_hessian", {"layers.0.up": FP8}),
            r"layers.0.up to fp8 .*, which local_hessian can't solve; "
            r"supported: nvfp4 in blocks of 16, w4a16_nvfp4 in blocks of 16$",
        ),
        (plan("svdquant"), r"algorithm 'svdquant'; supported: max, mse, awq_lite"),
        (plan("smoothquant"), r"layers.0.up to nvfp4 in blocks of 16, which smoothquant can't.*: int8_sq"),
        (
            plan("awq_lite", {"up": INT4_AWQ.with_blocks(64)}),
            r"blocks of 64, which awq_lite can't solve; supported: .*int4_awq in blocks of 128",
        ),
    ],
)
def test_what_no_solver_has_is_refused(made: QuantizerPlan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        solver_of(made)


def test_shipped_recipes_have_solvers() -> None:
    for name in (
        "nvfp4_awq_lite",
        "nvfp4_awq_clip",
        "nvfp4_awq_full",
        "nvfp4_w4a4_weight_local_hessian",
        "general/ptq/nvfp4_default-kv_none-gptq",
    ):
        recipe = resolve(name)
        solver = solver_of(QuantizerPlan(recipe, {"layers.0.up": NVFP4}))
        assert solver is not None and solver.method == recipe.algorithm and not solver.awq_first


def test_experts_share_an_array() -> None:
    assert array_name("model.layers.3.mlp.experts.17.up_proj", "scale") == (
        "model.layers.3.mlp.experts.E.up_proj@scale",
        17,
    )
    assert array_name("model.layers.3.self_attn.v_proj", "amax") == (
        "model.layers.3.self_attn.v_proj@amax",
        None,
    )
    assert stacked_name("model.layers.0.mlp.experts.2.down_proj") == "model.layers.0.mlp.experts.E.down_proj"
