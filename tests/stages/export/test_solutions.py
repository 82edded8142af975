"""Exports of solved runs: the checkpoint dequantizes to the solver's own weights, bit for bit."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.dequantize import weight_of
from stages.export.report import ExportReport
from stages.export.run import export
from stages.fold.folds import fold_norm
from stages.recipe.recipes import Recipe, resolve
from stages.settings import ExportSettings
from state.errors import IdentityMismatch, InputError, OutOfSpace
from state.reader import open_run
from tests.stages.export import support
from tests.stages.export.kill_driver import tree
from tests.stages.export.solving import HandSolved, hand_solve, open_model, random_scales, write_solutions
from tests.stages.export.test_folder import FailAt

GPTQ = "general/ptq/nvfp4_default-kv_none-gptq"
RECIPE = """
imports:
  base_disable_all: configs/ptq/units/base_disable_all
  default_disabled_quantizers: configs/ptq/units/default_disabled_quantizers
  weight: configs/numerics/{weight}
  input: configs/numerics/{input}
  kv_fp8: configs/ptq/units/kv_fp8
metadata:
  recipe_type: ptq
quantize:
  algorithm: {algorithm}
  quant_cfg:
    - $import: base_disable_all
    - quantizer_name: '*weight_quantizer'
      cfg: {{$import: weight}}
    - quantizer_name: '*input_quantizer'
      cfg: {{$import: input}}
    - $import: kv_fp8
    - $import: default_disabled_quantizers
"""


def write_recipe(path: Path, algorithm: str, weight: str = "nvfp4", input: str = "nvfp4") -> str:
    """A recipe file; input "plain": inputs stay as they are."""
    text = RECIPE.format(algorithm=algorithm, weight=weight, input=input)
    if input == "plain":
        lines = text.splitlines(keepends=True)
        text = "".join(line for line in lines if "input" not in line)
    path.write_text(text)
    return str(path)


def solved(made: Path, scratch: Path, recipe: Recipe | str, per_block: bool = False) -> HandSolved:
    chosen = resolve(recipe) if isinstance(recipe, str) else recipe
    return hand_solve(made / "model", made / "run", scratch / "run", chosen, per_block)


def run_export(run: Path, out: Path, recipe: str, **settings: object) -> ExportReport:
    return export(ExportSettings.model_validate({"run": run, "out": out, "recipe": recipe} | settings))


def assert_exact(out: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = load_file(out / "model.safetensors")
    assert len(weights) > 10
    for module, expected in weights.items():
        assert weight_of(tensors, module).equal(expected), module
    assert not [name for name in tensors if "pre_quant_scale" in name]
    return tensors


@pytest.mark.parametrize(
    ("recipe", "per_block"),
    [
        ("nvfp4_awq_lite", False),
        ("nvfp4_awq_clip", False),
        ("nvfp4_awq_full", False),
        ("nvfp4_awq_full", True),
        ("nvfp4_w4a4_weight_local_hessian", True),
        (GPTQ, False),
    ],
)
def test_the_checkpoint_is_plain_nvfp4_with_the_solvers_weights(
    made: Path, tmp_path: Path, recipe: str, per_block: bool
) -> None:
    by_hand = solved(made, tmp_path, recipe, per_block)
    report = run_export(by_hand.run, tmp_path / "out", recipe)
    tensors = assert_exact(tmp_path / "out", by_hand.weights)
    run_export(made / "run", tmp_path / "plain", "nvfp4")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in plain.items()
    }
    for name in ("config.json", "hf_quant_config.json"):
        assert support.parsed(tmp_path / "out" / name) == support.parsed(tmp_path / "plain" / name)
    assert report.solver is not None and report.solver.partition("-")[0] == resolve(recipe).algorithm


def test_gptq_on_weights_that_awq_has_scaled(made: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "[awq_lite, {method: gptq}]")
    by_hand = solved(made, tmp_path, recipe)
    run_export(by_hand.run, tmp_path / "out", recipe)
    tensors = assert_exact(tmp_path / "out", by_hand.weights)
    norm = "model.layers.0.input_layernorm.weight"
    assert not tensors[norm].equal(load_file(made / "model" / "model.safetensors")[norm])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `made`, of a Llama whose widths INT4's groups divide."""
    scratch = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    support.make_model(scratch / "model", support.config_of("llama", **sizes))
    support.make_run(scratch / "run", scratch / "model", support.make_text(scratch / "text.jsonl"))
    return scratch


@pytest.mark.parametrize(
    ("algorithm", "weight", "input", "per_block"),
    [
        ("awq_full", "int4_per_block", "plain", True),
        ("awq_lite", "fp8", "fp8", False),
        ("awq_full", "fp8", "fp8", False),
        ("gptq", "fp8", "fp8", False),
        ("gptq", "int4_per_block", "plain", False),
        ("[awq_lite, gptq]", "int4_per_block", "plain", False),
        ("awq_lite", "int8_per_channel", "int8", False),
        ("gptq", "int8_per_channel", "int8", False),
        ("[awq_lite, gptq]", "int8_per_channel", "int8", False),
    ],
)
def test_other_formats(
    wide: Path, tmp_path: Path, algorithm: str, weight: str, input: str, per_block: bool
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", algorithm, weight, input)
    by_hand = solved(wide, tmp_path, recipe, per_block)
    run_export(by_hand.run, tmp_path / "out", recipe)
    assert_exact(tmp_path / "out", by_hand.weights)


def test_w4a8(wide: Path, tmp_path: Path) -> None:
    by_hand = solved(wide, tmp_path, "w4a8_awq_beta")
    run_export(by_hand.run, tmp_path / "out", "w4a8_awq_beta")
    assert_exact(tmp_path / "out", by_hand.weights)


def test_the_cache_scale_of_v_follows_and_that_of_k_stays(made: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", "awq_lite")
    run_export(solved(made, tmp_path, recipe).run, tmp_path / "out", recipe)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    run, attention = open_run(made / "run"), "model.layers.0.self_attn"
    keys, values = (torch.tensor(run.amax(f"{attention}.{part}_bmm_quantizer")) for part in "kv")
    scale = random_scales(open_model(made / "model", made / "run", resolve(recipe)))[f"{attention}.v_proj"]
    assert tensors[f"{attention}.k_proj.k_scale"].equal(keys.max() / 448)
    assert tensors[f"{attention}.v_proj.v_scale"].equal((values / scale).max() / 448)


def test_norms_routers_and_input_scales_follow_the_scales(made: Path, tmp_path: Path) -> None:
    by_hand = solved(made, tmp_path, "nvfp4_awq_lite")
    run_export(by_hand.run, tmp_path / "out", "nvfp4_awq_lite")
    tensors, source = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", made / "model")
    )
    scales = random_scales(open_model(made / "model", made / "run", resolve("nvfp4_awq_lite")))
    layer = "model.layers.1"
    norm = scales[f"{layer}.post_attention_layernorm"]
    name = f"{layer}.post_attention_layernorm.weight"
    assert tensors[name].equal(fold_norm(source[name], norm, plus_one=False)[0])
    router = f"{layer}.mlp.gate.weight"
    assert tensors[router].equal((source[router].float() * norm).bfloat16())
    assert tensors["model.norm.weight"].equal(source["model.norm.weight"])

    run = open_run(made / "run")
    experts = [f"{layer}.mlp.experts.{number}" for number in range(4)]
    up = max((torch.tensor(run.amax(f"{expert}.up_proj")) / norm).max() for expert in experts)
    down = max(
        (torch.tensor(run.amax(f"{expert}.down_proj")) / scales[f"{expert}.up_proj"]).max()
        for expert in experts
    )
    for expert in experts:
        assert tensors[f"{expert}.gate_proj.input_scale"].equal(up / 2688)
        assert tensors[f"{expert}.down_proj.input_scale"].equal(down / 2688)


def test_the_report_says_what_a_solver_could_not_do(made: Path, tmp_path: Path) -> None:
    by_hand = solved(made, tmp_path, "nvfp4_awq_lite")
    report = run_export(by_hand.run, tmp_path / "out", "nvfp4_awq_lite")
    assert "layer-average" in report.policy_counts()
    assert set(report.kept_at_one) == {"lm_head"}
    content = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert content["kept_at_one"] == {"lm_head": "no reason"}
    assert content["solver"] == report.solver


def test_an_interrupted_export_goes_on_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    by_hand = solved(made, tmp_path, GPTQ)
    run_export(by_hand.run, tmp_path / "whole", GPTQ, shard_size=10_000)
    settings = ExportSettings(run=by_hand.run, out=tmp_path / "out", recipe=GPTQ, shard_size=10_000)
    with pytest.raises(OutOfSpace):
        export(settings, disk=FailAt(40, errno.ENOSPC))
    assert export(settings).shards_kept > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


class TestRefused:
    def test_a_missing_solution_is_told_with_the_command_that_makes_it(
        self, made: Path, tmp_path: Path
    ) -> None:
        places = " ".join(str(made / name) for name in ("model", "text.jsonl", "run"))
        command = f"holdfast calibrate {places} --recipe nvfp4_awq_full --samples 16 --seq 32 --batch 4"
        with pytest.raises(InputError, match=r"holds none for 2 layers \(0, 1\)") as caught:
            run_export(made / "run", tmp_path / "out", "nvfp4_awq_full")
        assert command in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_another_solution_at_the_same_place(self, made: Path, tmp_path: Path) -> None:
        first = solved(made, tmp_path, "nvfp4_awq_full")
        second = hand_solve(
            made / "model", made / "run", tmp_path / "second", resolve("nvfp4_awq_full"), True
        )
        run_export(first.run, tmp_path / "out", "nvfp4_awq_full")
        assert run_export(first.run, tmp_path / "out", "nvfp4_awq_full").already_finished
        with pytest.raises(IdentityMismatch) as caught:
            run_export(second.run, tmp_path / "out", "nvfp4_awq_full")
        assert {difference.field for difference in caught.value.differences} == {"solutions"}

    def test_a_module_that_the_solution_leaves_out(self, made: Path, tmp_path: Path) -> None:
        model = open_model(made / "model", made / "run", resolve(GPTQ))
        fields = {(f"model.layers.{layer}.input_layernorm", "alpha"): torch.tensor(0.5) for layer in range(2)}
        attributes = {"policies": [], "kept_at_one": {}}
        write_solutions(made / "run", tmp_path / "run", model.solver.id, fields, attributes)
        with pytest.raises(InputError, match=r"leaves out model\.layers\.0\.self_attn\.q_proj"):
            run_export(tmp_path / "run", tmp_path / "out", GPTQ)

    def test_scales_apart_for_weights_that_were_solved_folded(self, made: Path, tmp_path: Path) -> None:
        by_hand = solved(made, tmp_path, "nvfp4_awq_full")
        with pytest.raises(InputError, match="export with --fold auto"):
            run_export(by_hand.run, tmp_path / "out", "nvfp4_awq_full", fold="none")
