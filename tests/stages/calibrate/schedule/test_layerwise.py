"""The layerwise schedule measures what the whole-model schedule measures, and goes on where it stopped."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.calibrate.run import calibrate
from stages.calibrate.schedule.choose import solved_layers
from stages.export.run import export
from stages.export.solved import Solved
from stages.progress import Silent
from stages.recipe.recipes import resolve
from stages.settings import ExportSettings
from stages.unify import connected
from state.errors import InputError
from state.names import split_name
from state.reader import open_run
from tests.stages.calibrate import families, runs
from tests.stages.calibrate.runs import Crash, Interrupting, crash
from tests.stages.export import solving, support

LOCAL_HESSIAN = "nvfp4_w4a4_weight_local_hessian"
GPTQ = "general/ptq/nvfp4_default-kv_none-gptq"
AWQ_LITE = "nvfp4_awq_lite"
FIELD_TYPES = {"up_proj@values": np.int8, "up_proj@losses": np.float32}


settings = partial(runs.settings, samples=12, batch=5)


class Counting(Silent):
    """What a progress bar would show."""

    def start(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.total, self.shown = total, done

    def advance(self, amount: int, **facts: int) -> None:
        self.shown += amount


def make_inputs(folder: Path, family: str) -> Path:
    if family in ("llama", "qwen3_moe"):
        support.make_model(folder / "model", support.config_of(family))
    else:
        config = families.tiny_config(family)
        config.vocab_size = support.SIZES["vocab_size"]
        if hasattr(config, "vocab_size_per_layer_input"):
            config.vocab_size_per_layer_input = config.vocab_size
        support.make_model(folder / "model", config)
    support.make_text(folder / "text.jsonl")
    return folder


def arrays(run: Path) -> dict[str, bytes]:
    return {path: values.tobytes() for path, values in open_run(run).generation().arrays.items()}


def solutions(run: Path, layers: int = 2) -> dict[str, Any]:
    calibration = open_run(run)
    solver_id = next(
        path.split("/")[2]
        for path in calibration.head.objects
        if path.startswith("calibration.zarr/solutions/") and path.count("/") > 3
    )
    found = {}
    for layer in range(layers):
        solution = calibration.solution(solver_id, layer)
        found |= {f"{layer}/{name}": values.tobytes() for name, values in solution.arrays.items()}
        found[f"{layer}"] = solution.attributes
    return found


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3_moe", "gemma3", "gemma3n", "gemma4", "deepseek_v3", "nemotron_h", "qwen3_next"],
)
def test_statistics_are_bit_equal_to_the_whole_model_schedule(family: str, tmp_path: Path) -> None:
    """Gemma 3n and 4 have linears before the layers, and Gemma 3n behind them."""
    inputs = make_inputs(tmp_path, family)
    for schedule in ("whole", "layerwise"):
        calibrate(settings(inputs, tmp_path / schedule, schedule=schedule, recipe="fp8"), Silent())
    assert arrays(tmp_path / "layerwise") == arrays(tmp_path / "whole")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("moe"), "qwen3_moe")


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_awq_full", LOCAL_HESSIAN, GPTQ])
@pytest.mark.parametrize("batches", [2, 5])
def test_after_a_crash_in_a_layer_the_end_is_the_same(
    moe: Path, tmp_path: Path, recipe: str, batches: int
) -> None:
    wish = {"schedule": "layerwise", "recipe": recipe}
    calibrate(settings(moe, tmp_path / "undisturbed", **wish), Silent())
    with pytest.raises(Crash):
        calibrate(settings(moe, tmp_path / "run", **wish), Interrupting(batches, crash))
    assert not open_run(tmp_path / "run").head.finished
    calibrate(settings(moe, tmp_path / "run", **wish), Silent())
    assert arrays(tmp_path / "run") == arrays(tmp_path / "undisturbed")
    if recipe != "nvfp4":
        assert solutions(tmp_path / "run") == solutions(tmp_path / "undisturbed")


def test_hidden_states_in_a_file_give_the_same(moe: Path, tmp_path: Path) -> None:
    wish = {"schedule": "layerwise", "recipe": GPTQ, "device": "cpu"}  # a GPU's memory would hold them
    calibrate(settings(moe, tmp_path / "undisturbed", **wish), Silent())
    with pytest.raises(Crash):
        calibrate(settings(moe, tmp_path / "run", activation_memory=1, **wish), Interrupting(5, crash))
    assert list((tmp_path / "run" / "activations").rglob("*.raw"))
    calibrate(settings(moe, tmp_path / "run", activation_memory=1, **wish), Silent())
    assert arrays(tmp_path / "run") == arrays(tmp_path / "undisturbed")
    assert solutions(tmp_path / "run") == solutions(tmp_path / "undisturbed")
    assert not (tmp_path / "run" / "activations").exists()


def test_a_solver_is_added_to_a_finished_run(moe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    calibrate(settings(moe, run), Silent())
    before = open_run(run).head
    assert not calibrate(settings(moe, run, recipe="nvfp4_awq_lite"), Silent()).already_finished
    after = open_run(run).head
    assert after.generation == before.generation and after.finished
    assert {path: after.objects[path] for path in before.objects} == before.objects
    (solver_id,) = {path.split("/")[2] for path in after.objects if "/solutions/awq" in path}
    assert solved_layers(solver_id, after) == {0, 1}
    assert calibrate(settings(moe, run, recipe="nvfp4_awq_lite"), Silent()).already_finished

    calibrate(settings(moe, tmp_path / "together", recipe="nvfp4_awq_lite"), Silent())
    assert arrays(tmp_path / "together") == arrays(run)
    assert solutions(tmp_path / "together") == solutions(run)


def test_a_run_goes_on_with_the_schedule_it_began_with(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        calibrate(settings(moe, tmp_path / "run", schedule="layerwise"), Interrupting(5, crash))
    with pytest.raises(InputError, match="begun with the layerwise schedule"):
        calibrate(settings(moe, tmp_path / "run", schedule="whole"), Silent())


@pytest.mark.parametrize(("recipe", "field"), [(GPTQ, "up_proj@values"), (AWQ_LITE, "up_proj@losses")])
def test_experts_without_tokens_are_solved_and_named(
    recipe: str, field: str, moe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    calibrate(settings(moe, run, samples=1, seq=1, recipe=recipe), Silent())
    calibration = open_run(run)
    experts = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(4)]
    unseen = [name for name in experts if np.isnan(calibration.amax(name)).all()]
    assert len(unseen) == 2  # one token goes to two of four experts
    found = solutions(run)
    values = np.frombuffer(found[f"0/model.layers.0.mlp.experts.E.{field}"], dtype=FIELD_TYPES[field])
    solved = values.reshape(4, -1)
    assert np.isfinite(solved).all() and solved.any(axis=1).all()
    named = {module for policy in found["0"]["policies"] for module in policy["modules"]}
    assert set(unseen) <= named


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "nemotron_h"])
def test_what_is_solved_is_what_export_folds(family: str, tmp_path: Path) -> None:
    """MLA's values, relu² experts, shared experts: the solver's folded weights are those of export."""
    config = families.tiny_config(family)
    config.vocab_size = support.SIZES["vocab_size"]
    for name in ("q_lora_rank", "moe_intermediate_size", "moe_shared_expert_intermediate_size"):
        if getattr(config, name, None) == 24:
            setattr(config, name, 32)  # whole blocks
    support.make_model(tmp_path / "model", config)
    support.make_text(tmp_path / "text.jsonl")
    calibrate(settings(tmp_path, tmp_path / "run", recipe="nvfp4_awq_lite"), Silent())

    calibration = open_run(tmp_path / "run")
    model = solving.open_model(tmp_path / "model", tmp_path / "run", resolve("nvfp4_awq_lite"))
    solved = Solved(calibration, model.solver, model.quantizers)
    modules = [name for name in model.quantizers.weights if split_name(name)[1] is not None]
    scales = solved.scales(model.folds.sites)
    assert any((scale != 1).any() for scale in scales.values())
    groups = [*calibration.layout.groups("same_input"), *calibration.layout.groups("engine_fused")]
    recorded = solved.weight_amax(modules)
    for group in dict.fromkeys(connected(modules, groups).values()):
        folded = max(solving.folded_weight(model, module, scales).abs().max().item() for module in group)
        assert {recorded[module].item() for module in group} == {folded}, group


def test_layers_that_are_computed_again_are_no_progress(moe: Path, tmp_path: Path) -> None:
    wish = {"schedule": "layerwise", "recipe": GPTQ}
    with pytest.raises(Crash):
        calibrate(settings(moe, tmp_path / "run", **wish), Interrupting(5, crash))
    progress = Counting()
    summary = calibrate(settings(moe, tmp_path / "run", **wish), progress)
    assert progress.shown == progress.total
    assert summary.tokens == 12 * 32 / 2  # one of two layers


def test_half_of_the_layers_are_not_exported(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        calibrate(settings(moe, tmp_path / "run", schedule="layerwise"), Interrupting(5, crash))
    wanted = ExportSettings(run=tmp_path / "run", out=tmp_path / "out", partial=True)
    with pytest.raises(InputError, match=r"holds the layers before 1 .*finish it with: holdfast calibrate"):
        export(wanted, Silent())
