"""Checkpoints that modelopt's own exporter wrote."""

from pathlib import Path

import pytest

from tests.stages.export import support
from tests.stages.verify.editable import Editable, damaged, verified

KV = "general/ptq/nvfp4_default-kv_fp8"
RECIPES = (KV, "fp8", "nvfp4_mlp_only", "w4a16_nvfp4", "mxfp8", "fp8_per_channel_per_token")
LOADED_BY = {"fp8_per_channel_per_token": {"vllm"}, "w4a16_nvfp4": {"vllm", "sglang"}, "mxfp8": {"vllm"}}
EVERY = {"vllm", "sglang", "trtllm"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, dense and wide enough for blocks of 128, and its run."""
    folder = tmp_path_factory.mktemp("foreign")
    support.make_model(folder / "model", support.config_of("llama", hidden_size=128, intermediate_size=128))
    support.make_run(folder / "run", folder / "model", support.make_text(folder / "text.jsonl"), samples=8)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_passes_for_the_engines_that_load_it(source: Path, tmp_path: Path, recipe: str) -> None:
    model = support.quantized_by_modelopt(source / "model", source / "run", recipe)
    out = support.exported_by_modelopt(model, tmp_path / "out")
    report = verified(out, model=str(source / "model"))
    assert report.findings == ()
    loading = {engine for engine in report.engines if report.loads(engine)}
    assert loading == LOADED_BY.get(recipe, EVERY)
    for engine in EVERY - loading:
        assert "not-loaded" in verified(out, target=engine).counts()


def test_damage_to_it_is_found_too(source: Path, tmp_path: Path) -> None:
    model = support.quantized_by_modelopt(source / "model", source / "run", KV)
    support.exported_by_modelopt(model, tmp_path / "out")

    def edit(content: Editable) -> None:
        content.drop("model.layers.1.mlp.up_proj.input_scale")

    found = verified(damaged(tmp_path / "out", tmp_path / "damaged", edit)).findings
    assert [(finding.rule, finding.name) for finding in found] == [
        ("missing-tensor", "model.layers.1.mlp.up_proj.input_scale")
    ]
