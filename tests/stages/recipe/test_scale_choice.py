"""What modelopt's `mse` means, and what is refused of it."""

from pathlib import Path
from typing import Any

import pytest

from stages.formats import FP8, NVFP4
from stages.model.skeleton import Skeleton, load_config
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import Recipe, resolve
from stages.recipe.scale_choice import scales_of
from stages.recipe.solvers import solver_of
from state.errors import InputError
from state.source import Source
from tests.stages.export import support


@pytest.mark.parametrize(
    ("recipe", "choice"),
    [
        ("nvfp4", "max"),
        ("nvfp4_awq_lite", "max"),
        ("nvfp4_w4a4_weight_mse_fp8_sweep", "mse"),
        ("general/ptq/nvfp4_experts_only_mse-kv_fp8_cast", "mse"),
        ("nvfp4_four_over_six", "four_over_six"),
    ],
)
def test_recipes_that_are_shipped(recipe: str, choice: str) -> None:
    assert scales_of(resolve(recipe)) == choice


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fp8_scale_sweep": False},
        {"start_multiplier": 1.0, "stop_multiplier": 1.5},
        {"fp8_scale_sweep": True, "start_multiplier": 1.0},
        {"start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.25},
    ],
)
def test_other_searches_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"recipe 'own' searches scales by .*; supported: fp8_scale_sweep"):
        scales_of(Recipe("own", [], "mse", options))


SWEEP = "{method: mse, fp8_scale_sweep: true}"
CHOICE = "{method: mse, start_multiplier: 1.0, stop_multiplier: 1.5, step_size: 0.5}"


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    folder = support.make_model(tmp_path_factory.mktemp("model"), support.config_of("llama"))
    return Skeleton(load_config(folder), Source.open(folder).tensors)


def own(path: Path, algorithm: str, weight: str) -> Recipe:
    path.write_text(f"""
imports: {{weight: configs/numerics/{weight}}}
metadata: {{recipe_type: ptq}}
quantize:
  algorithm: {algorithm}
  quant_cfg:
    - {{quantizer_name: '*', enable: false}}
    - {{quantizer_name: '*mlp*weight_quantizer', cfg: {{$import: weight}}}}
    - {{quantizer_name: '*o_proj.*_quantizer', cfg: {{num_bits: e4m3}}}}
    - {{quantizer_name: '*o_proj.output_quantizer', enable: false}}
""")
    return resolve(str(path))


@pytest.mark.parametrize(
    ("algorithm", "weight", "named"),
    [
        ("max", "nvfp4_four_over_six", "four_over_six=True and scales by max"),
        (SWEEP, "nvfp4_four_over_six", "four_over_six=True and scales by mse"),
        (CHOICE, "nvfp4_static", "four_over_six=False and scales by four_over_six"),
        (SWEEP, "nvfp4", "type='dynamic', of which modelopt searches no scales"),
    ],
)
def test_weights_that_modelopt_would_search_otherwise(
    skeleton: Skeleton, tmp_path: Path, algorithm: str, weight: str, named: str
) -> None:
    with pytest.raises(InputError) as error:
        plan_quantizers(skeleton, own(tmp_path / "own.yaml", algorithm, weight))
    assert named in str(error.value) and "layers.0.mlp.gate_proj" in str(error.value)


def test_a_search_is_no_solver_and_leaves_other_formats_alone(skeleton: Skeleton, tmp_path: Path) -> None:
    plan = plan_quantizers(skeleton, own(tmp_path / "own.yaml", SWEEP, "nvfp4_static"))
    assert solver_of(plan) is None
    assert {weight.name for weight in plan.weights.values()} == {"w4a16_nvfp4", FP8.name}
    preset = plan_quantizers(skeleton, resolve("nvfp4_four_over_six"))
    assert set(preset.weights.values()) == {NVFP4}
