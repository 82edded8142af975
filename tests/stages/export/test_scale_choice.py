"""`export --scales`: what it changes, what it is refused with, and that it is part of the identity."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.dequantize import weight_of
from stages.export.report import ExportReport
from stages.export.run import export
from stages.export.scale_choice import uses, with_scales
from stages.formats import FP8, NVFP4
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe
from stages.recipe.solvers import Solver
from stages.settings import ExportSettings
from state.errors import IdentityMismatch, InputError
from tests.stages.export import support


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("made")
    model = support.make_model(scratch / "model", support.config_of("qwen3_moe"))
    support.make_run(scratch / "run", model, support.make_text(scratch / "text.jsonl"))
    return scratch


def run_export(made: Path, out: Path, **settings: object) -> ExportReport:
    return export(ExportSettings.model_validate({"run": made / "run", "out": out} | settings))


def squared_error(made: Path, out: Path) -> float:
    source, tensors = (load_file(folder / "model.safetensors") for folder in (made / "model", out))
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    assert len(modules) == 32
    errors = (weight_of(tensors, name) - source[f"{name}.weight"] for name in modules)
    return sum(error.square().sum().item() for error in errors)


def test_one_run_and_every_choice(made: Path, tmp_path: Path) -> None:
    errors = {}
    for scales in ("max", "four_over_six", "mse"):
        report = run_export(made, tmp_path / scales, scales=scales)
        uses = {use.policy: len(use.quantizers) for use in report.policies if "scales" in use.policy}
        assert uses == ({} if scales == "max" else {f"scales={scales}": 32})
        errors[scales] = squared_error(made, tmp_path / scales)
    assert errors["mse"] < errors["four_over_six"] < errors["max"]
    run_export(made, tmp_path / "plain")
    assert support.tensors(tmp_path / "plain") == support.tensors(tmp_path / "max")


@pytest.mark.parametrize(
    ("recipe", "scales"),
    [("nvfp4_w4a4_weight_mse_fp8_sweep", "mse"), ("nvfp4_four_over_six", "four_over_six")],
)
def test_a_preset_is_a_recipe_and_a_choice(made: Path, tmp_path: Path, recipe: str, scales: str) -> None:
    run_export(made, tmp_path / "preset", recipe=recipe)
    run_export(made, tmp_path / "choice", scales=scales)
    assert support.tensors(tmp_path / "preset") == support.tensors(tmp_path / "choice")
    run_export(made, tmp_path / "max", recipe=recipe, scales="max")
    run_export(made, tmp_path / "plain")
    assert support.tensors(tmp_path / "max") == support.tensors(tmp_path / "plain")


@pytest.mark.parametrize("scales", ["mse", "four_over_six"])
def test_bytes_do_not_depend_on_the_size_of_pieces(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: str
) -> None:
    run_export(made, tmp_path / "one", scales=scales)
    monkeypatch.setattr("stages.export.reading.AT_ONCE", 600)
    monkeypatch.setattr("stages.formats.packing.AT_ONCE", 40)
    run_export(made, tmp_path / "pieces", scales=scales)
    assert support.tensors(tmp_path / "one") == support.tensors(tmp_path / "pieces")


def test_another_choice_is_another_export(made: Path, tmp_path: Path) -> None:
    run_export(made, tmp_path / "out", scales="mse")
    assert run_export(made, tmp_path / "out", scales="mse").already_finished
    with pytest.raises(IdentityMismatch, match="scales"):
        run_export(made, tmp_path / "out", scales="four_over_six")
    with pytest.raises(IdentityMismatch, match="scales"):
        run_export(made, tmp_path / "out")


def test_a_recipe_without_nvfp4_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--scales mse has nothing to act on: recipe 'fp8'"):
        run_export(made, tmp_path / "out", recipe="fp8", scales="mse")
    assert not (tmp_path / "out").exists()


PLAN = QuantizerPlan(Recipe("own", [], "max", {}), {"up": NVFP4, "down": FP8})


def test_weights_of_other_formats_keep_their_scales() -> None:
    plan, choice = with_scales(PLAN, "mse", None, False)
    assert choice == "mse"
    assert plan.weights == {"up": NVFP4.with_scales("mse"), "down": FP8}


def test_weights_without_a_choice_are_named() -> None:
    plan, choice = with_scales(PLAN, "four_over_six", None, False)
    assert {use.policy: use.quantizers for use in uses(plan, choice)} == {
        "scales=four_over_six": ("up.weight_quantizer",),
        "scales=max": ("down.weight_quantizer",),
    }
    assert uses(PLAN, "max") == ()


def test_nobody_else_may_choose_the_scales() -> None:
    gptq = Solver("gptq", False, True, 0.01, 1.0, "gptq-1")
    with pytest.raises(InputError, match="scales that gptq of recipe 'own' chooses; leave one of both out"):
        with_scales(PLAN, "mse", gptq, False)
    with pytest.raises(InputError, match="--mxfp4-scale cast keeps the source's scales"):
        with_scales(PLAN, "mse", None, True)
    assert with_scales(PLAN, None, gptq, True) == (PLAN, "max")
    smoothing = Solver("awq_lite", False, True, 0.01, 1.0, "awq_lite-1")
    assert with_scales(PLAN, "mse", smoothing, False)[1] == "mse"
