"""Plans kept beside a run: equal to new ones, used without transformers and modelopt, remade if in doubt."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.recipe.kept_plans import FOLDER, keep_plan, kept_plan
from stages.recipe.model_plan import ModelPlan, make_plan
from state.source import Source
from tests.families.fused import gpt_oss
from tests.families.layout import Family
from tests.families.newest import minimax_m3
from tests.families.write import write_family
from tests.stages.export import support

RECIPES = ["nvfp4", "general/ptq/nvfp4_default-kv_fp8", "nvfp4_awq_full", "int8_smoothquant"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.make_model(tmp_path_factory.mktemp("kept") / "model", support.config_of("qwen3_moe"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_kept_plan_equals_a_new_one(recipe: str, model: Path, tmp_path: Path) -> None:
    source = Source.open(model)
    assert kept_plan(tmp_path, model, source, recipe) is None
    made = make_plan(model, source, recipe)
    keep_plan(tmp_path, model, source, recipe, made)
    kept = kept_plan(tmp_path, model, source, recipe)
    assert kept is not None
    assert repr(facts(kept)) == repr(facts(made))  # in the same order too: reports follow it
    assert kept.quantizers.recipe.digest == made.quantizers.recipe.digest


@pytest.mark.parametrize("family", [gpt_oss, minimax_m3])
def test_tensors_that_modules_share_are_kept(family: Callable[[], Family], tmp_path: Path) -> None:
    write_family(family(), tmp_path / "model")
    source = Source.open(tmp_path / "model")
    made = make_plan(source.folder, source, "fp8")
    keep_plan(tmp_path, source.folder, source, "fp8", made)
    kept = kept_plan(tmp_path, source.folder, source, "fp8")
    assert kept is not None and repr(facts(kept)) == repr(facts(made))
    assert bool(kept.quantizers.together) != bool(kept.quantizers.merged)


def facts(plan: ModelPlan) -> dict[str, object]:
    """A plan but for its recipe's rules, which come back from JSON as text and lists."""
    quantizers = vars(plan.quantizers) | {"recipe": plan.quantizers.recipe.as_json()}
    quantizers["fused_experts"] = sorted(plan.quantizers.fused_experts)
    return vars(plan) | {"quantizers": quantizers}


@pytest.fixture
def kept(model: Path, tmp_path: Path) -> Path:
    source = Source.open(model)
    keep_plan(tmp_path, model, source, "fp8", make_plan(model, source, "fp8"))
    (path,) = (tmp_path / FOLDER).iterdir()
    return path


def test_a_damaged_plan_is_not_used(kept: Path, model: Path, tmp_path: Path) -> None:
    content = kept.read_bytes()
    for damaged in (content[:-1], content.replace(b'"fp8"', b'"fp9"', 1), b"", b"\xff\n{}"):
        kept.write_bytes(damaged)
        assert kept_plan(tmp_path, model, Source.open(model), "fp8") is None
    kept.write_bytes(content)
    assert kept_plan(tmp_path, model, Source.open(model), "fp8") is not None


def test_another_config_or_recipe_finds_no_plan(kept: Path, model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in model.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    assert kept_plan(tmp_path, changed, Source.open(changed), "fp8") is not None
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert kept_plan(tmp_path, changed, Source.open(changed), "fp8") is None
    assert kept_plan(tmp_path, model, Source.open(model), "nvfp4") is None


def test_plans_for_code_and_for_files_of_ones_own_are_not_kept(model: Path, tmp_path: Path) -> None:
    source, plan = Source.open(model), make_plan(model, Source.open(model), "fp8")
    keep_plan(tmp_path, model, source, "./fp8.yaml", plan)
    with_code = tmp_path / "code"
    with_code.mkdir()
    for path in model.iterdir():
        (with_code / path.name).write_bytes(path.read_bytes())
    (with_code / "modeling.py").write_text("")
    keep_plan(tmp_path, with_code, Source.open(with_code), "fp8", plan)
    assert not (tmp_path / FOLDER).exists()


UNTIL_THE_FIRST_TENSOR = """
import sys
from pathlib import Path
from stages.export.run import export
from stages.export.tensors import TensorMaker
from stages.settings import ExportSettings

def first(self, spec):
    found = [name for name in ("transformers", "modelopt") if name in sys.modules]
    sys.exit(" ".join(found) or "neither")

TensorMaker.make = first
export(ExportSettings(run=Path(sys.argv[1]), out=Path(sys.argv[2])))
"""


def test_export_reaches_its_first_tensor_without_transformers_and_modelopt(
    model: Path, tmp_path: Path
) -> None:
    support.make_run(tmp_path / "run", model, support.make_text(tmp_path / "text.jsonl"))
    command = [sys.executable, "-c", UNTIL_THE_FIRST_TENSOR, str(tmp_path / "run"), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stderr.strip().splitlines()[-1] == "neither", ran.stderr
