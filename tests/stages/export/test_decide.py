"""All scales of a checkpoint from literal observations."""

import math
from typing import Any

import pytest
import torch

from stages.export.decide import Decisions, decide
from stages.export.observed import Observed
from stages.formats import FP8, NVFP4
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe
from stages.settings import UnseenPolicy
from stages.unify import Policies

NVFP4_STEP, FP8_STEP = 6.0 * 448.0, 448.0


def decided(
    observed: dict[str, Any],
    caches: dict[str, float] | None = None,
    unseen: UnseenPolicy = "layer",
    **fields: Any,
) -> Decisions:
    """Decisions on modules with the given input amax; every weight's amax is 448."""
    plan = QuantizerPlan(recipe=Recipe("test", [], "max", {}), **fields)
    inputs = {f"{module}.input_quantizer": torch.tensor(amax) for module, amax in observed.items()}
    kv = {name: torch.tensor(amax) for name, amax in (caches or {}).items()}
    found = Observed(inputs, kv, {module: torch.tensor(448.0) for module in plan.weights})
    return decide(found, plan, [], [], Policies(unseen=unseen))


def values(decisions: Decisions) -> dict[str, float]:
    return {name: scale.item() for name, scale in decisions.scales.items()}


def test_each_format_has_its_scales() -> None:
    found = decided(
        {"a": [NVFP4_STEP, 1.0], "b": 2 * FP8_STEP},
        weights={"a": NVFP4, "b": FP8},
        inputs={"a": "a.input_quantizer", "b": "b.input_quantizer"},
    )
    assert values(found) == {
        "a.input_scale": 1.0,
        "a.weight_scale_2": pytest.approx(448 / NVFP4_STEP),
        "b.input_scale": 2.0,
        "b.weight_scale": 1.0,
    }
    assert found.weights_only == frozenset() and found.uses == ()


def test_weights_quantized_alone_have_no_input_scale() -> None:
    assert values(decided({}, weights={"b": FP8})) == {"b.weight_scale": 1.0}


def test_an_amax_fixed_by_the_recipe_needs_no_observation() -> None:
    found = decided({}, weights={"b": FP8}, inputs={"b": "q"}, constant_inputs={"b": 224.0})
    assert values(found)["b.input_scale"] == 0.5


def test_caches_are_observed_or_unit() -> None:
    found = decided(
        {},
        {"0.self_attn.k_bmm_quantizer": 448.0, "0.self_attn.v_bmm_quantizer": 0.0},
        kv={"0.self_attn": "fp8", "1.self_attn": "fp8_cast"},
    )
    assert values(found) == {
        "0.self_attn.k_proj.k_scale": 1.0,
        "0.self_attn.v_proj.v_scale": pytest.approx(1 / 448),
        "1.self_attn.k_proj.k_scale": 1.0,
        "1.self_attn.v_proj.v_scale": 1.0,
    }
    assert [(use.policy, use.quantizers) for use in found.uses] == [
        ("dead=floor", ("0.self_attn.v_bmm_quantizer",))
    ]


def test_an_unseen_expert_is_left_without_input_scale_by_policy_only() -> None:
    experts = [f"layers.0.experts.{number}.up" for number in (0, 1)]
    fields: dict[str, Any] = {"weights": dict.fromkeys(experts, FP8), "inputs": dict.fromkeys(experts, "q")}
    observed = {experts[0]: 448.0, experts[1]: math.nan}
    layer = decided(observed, **fields)
    assert values(layer)[f"{experts[1]}.input_scale"] == 1.0 and layer.weights_only == frozenset()
    alone = decided(observed, unseen="weights-only", **fields)
    assert f"{experts[1]}.input_scale" not in alone.scales and alone.weights_only == {experts[1]}


def test_scales_of_experts_in_one_tensor_are_named_after_it() -> None:
    modules = ["experts.0.up", "experts.1.up"]
    found = decided(
        dict(zip(modules, (FP8_STEP, 2 * FP8_STEP), strict=True)),
        weights=dict.fromkeys(modules, FP8),
        inputs=dict.fromkeys(modules, "q"),
        fused_experts=frozenset(modules),
        together=dict.fromkeys(modules, "experts.all"),
    )
    assert values(found) == {"experts.all_input_scale": 2.0, "experts.all_weight_scale": 1.0}


def test_linears_that_the_class_merges_share_an_fp8_scale() -> None:
    plan = QuantizerPlan(
        recipe=Recipe("test", [], "max", {}),
        weights=dict.fromkeys(("gate", "up", "down"), FP8),
        merged={"gate": "gate_up", "up": "gate_up"},
    )
    amax = {"gate": torch.tensor(448.0), "up": torch.tensor(896.0), "down": torch.tensor(448.0)}
    found = decide(Observed({}, {}, amax), plan, [], [], Policies())
    assert values(found) == {"gate.weight_scale": 2.0, "up.weight_scale": 2.0, "down.weight_scale": 1.0}
