"""Engines that an export is for: told, asked for, and refused before anything is written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.engines.stated import inline
from stages.export.closing import require_readable
from stages.export.report import ExportReport
from stages.export.run import export
from stages.settings import ExportSettings
from state.errors import InputError
from tests.stages.export import support
from tests.stages.verify.editable import Editable, damaged

ENGINES = ("vllm", "sglang", "trtllm")


def run_export(made: Path, out: Path, **settings: object) -> ExportReport:
    chosen = {"run": made / "run", "out": out} | settings
    return export(ExportSettings.model_validate(chosen))


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8", "general/ptq/nvfp4_default-kv_fp8"])
def test_what_every_engine_loads(made: Path, tmp_path: Path, recipe: str, target: str) -> None:
    report = run_export(made, tmp_path / "out", recipe=recipe, target=target)
    assert report.engines == {engine: [] for engine in ENGINES}
    written = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert written["engines"] == {engine: {"loads": True, "why_not": []} for engine in ENGINES}


@pytest.mark.parametrize("target", ENGINES)
def test_what_an_engine_does_not_load_is_refused_before_the_first_byte(
    made: Path, tmp_path: Path, target: str
) -> None:
    with pytest.raises(InputError, match="does not load W8A8_SQ_PER_CHANNEL; choose a recipe such as nvfp4"):
        run_export(made, tmp_path / "out", recipe="int8_smoothquant", target=target)
    assert list(tmp_path.iterdir()) == []


def test_without_a_target_it_is_exported_and_told(made: Path, tmp_path: Path) -> None:
    report = run_export(made, tmp_path / "out", recipe="int8_smoothquant")
    assert all("does not load" in report.engines[engine][0] for engine in ENGINES)


def unseen(arrays: dict[str, np.ndarray]) -> None:
    """As if no token had reached expert 2 of layer 1."""
    for name, values in arrays.items():
        if ".experts.E." in name and not name.startswith("weight_amax/"):
            values[1, 2] = -1 if name.startswith("tokens/") else math.nan


def test_an_expert_without_an_input_scale_is_for_no_engine(made: Path, tmp_path: Path) -> None:
    run = support.variant_of(made / "run", tmp_path / "run", unseen)
    with pytest.raises(InputError, match=r"vLLM needs an input scale for .*experts\.2\.down_proj \(3 such\)"):
        run_export(made, tmp_path / "out", run=run, unseen="weights-only", target="vllm")
    report = run_export(made, tmp_path / "out", run=run, unseen="weights-only")
    assert report.engines["vllm"][0].endswith("give --unseen layer")
    assert run_export(made, tmp_path / "layer", run=run, target="vllm").engines["vllm"] == []


def test_the_target_is_no_part_of_the_identity(made: Path, tmp_path: Path) -> None:
    run_export(made, tmp_path / "out")
    assert run_export(made, tmp_path / "out", target="sglang").already_finished


class TestTheLastLook:
    def test_nothing_is_strange_about_a_good_one(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out")
        assert require_readable(tmp_path / "out", ()) == []

    def test_a_wrong_scale_is_not_published(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out")

        def zero(content: Editable) -> None:
            content.tensors["model.layers.0.self_attn.o_proj.input_scale"] = torch.tensor(0.0)

        out = damaged(tmp_path / "out", tmp_path / "zero", zero)
        with pytest.raises(InputError, match=r"was not published: scale-value: .*o_proj\.input_scale: is 0"):
            require_readable(out, ())

    def test_what_a_source_may_bring_is_told(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out")

        def add(content: Editable) -> None:
            content.tensors["model.layers.0.other.weight_scale_inv"] = torch.ones(1, 1)

        (found,) = require_readable(damaged(tmp_path / "out", tmp_path / "more", add), ())
        assert (found.rule, found.name) == ("extra-tensor", "model.layers.0.other.weight_scale_inv")

    def test_scales_that_a_policy_left_out_are_not_missed(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out")
        module = "model.layers.0.self_attn.o_proj"
        out = damaged(
            tmp_path / "out", tmp_path / "less", lambda content: content.drop(f"{module}.input_scale")
        )
        assert require_readable(out, [module]) == []
        assert [found.rule for found in require_readable(out, ())] == ["missing-tensor"]


def test_the_configuration_is_read_as_engines_read_it(made: Path, tmp_path: Path) -> None:
    run_export(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert inline(config).algo == "NVFP4" and "lm_head" in inline(config).ignored
