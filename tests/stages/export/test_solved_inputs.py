"""An export under other policies than those that a solver saw inputs under says so."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.export.observed import Observed
from stages.export.run import export
from stages.export.solved_inputs import NOT_AS_SOLVED, not_as_solved
from stages.formats import NVFP4
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe
from stages.recipe.solvers import solver_of
from stages.settings import ExportSettings
from stages.unify import Policies, PolicyUse
from tests.stages.calibrate.runs import Interrupting, crash
from tests.stages.export import support
from tests.stages.export.test_solutions import GPTQ, solved

EXPERTS = [f"layers.0.experts.{number}.up_proj" for number in range(3)]
QUANTIZERS = [f"{module}.input_quantizer" for module in EXPERTS]


def uses(policies: Policies, method: str = "gptq", inputs: bool = True) -> Sequence[PolicyUse]:
    """Of experts that share a scale and of which the first two have a smaller amax, or none."""
    plan = QuantizerPlan(
        Recipe("test", [], method, {}),
        dict.fromkeys((*EXPERTS, "lm_head"), NVFP4),
        dict(zip(EXPERTS, QUANTIZERS, strict=True)) if inputs else {},
        fused_experts=frozenset(EXPERTS),
    )
    seen = dict(zip(QUANTIZERS, map(torch.tensor, (math.nan, 1.0, 4.0)), strict=True))
    return not_as_solved(solver_of(plan), Observed(seen, {}, {}), plan, [], [], policies)


def test_the_inputs_that_a_policy_gives_another_scale_are_named() -> None:
    assert uses(Policies(unseen="weights-only")) == (
        PolicyUse(
            "inputs=not as solved",
            (QUANTIZERS[0],),
            "gptq saw inputs under unseen=layer, and this export is under unseen=weights-only: "
            "1 of 3 inputs have another scale than it saw",
        ),
    )
    (both,) = uses(Policies(unseen="weights-only", expert_input_scale="expert"))
    assert both.quantizers == (QUANTIZERS[0], QUANTIZERS[1])
    assert "under unseen=layer, expert_input_scale=layer, and this export" in both.detail


def test_other_policies_that_change_nothing_are_told_of_too() -> None:
    (use,) = uses(Policies(dead="error"))
    assert use.quantizers == () and use.detail.endswith("0 of 3 inputs have another scale than it saw")


@pytest.mark.parametrize(
    "asked",
    [
        {"policies": Policies()},
        {"policies": Policies(unseen="weights-only"), "method": "max"},
        {"policies": Policies(unseen="weights-only"), "method": "awq_lite"},
        {"policies": Policies(unseen="weights-only"), "inputs": False},
    ],
    ids=["the same", "no solver", "one stream", "inputs as they are"],
)
def test_else_nothing_is_said(asked: dict[str, Any]) -> None:
    assert uses(**asked) == ()


def unseen(arrays: dict[str, np.ndarray]) -> None:
    """No token reached expert 2 of layer 0."""
    for name, values in arrays.items():
        if ".experts.E." in name and name.endswith(".input"):
            values[0, 2] = np.nan if values.dtype.kind == "f" else -1


def test_an_export_says_so_on_the_screen_and_in_its_report(tmp_path: Path) -> None:
    support.make_model(tmp_path / "model", support.config_of("qwen3_moe"))
    support.make_text(tmp_path / "text.jsonl")
    support.make_run(tmp_path / "observed", tmp_path / "model", tmp_path / "text.jsonl")
    support.variant_of(tmp_path / "observed", tmp_path / "run", unseen)
    (tmp_path / "solved").mkdir()
    run = solved(tmp_path, tmp_path / "solved", GPTQ).run
    for policy, said in (("layer", 0), ("weights-only", 1)):
        progress = Interrupting(0, crash)
        settings = ExportSettings.model_validate(
            {"run": run, "out": tmp_path / policy, "recipe": GPTQ, "unseen": policy}
        )
        export(settings, progress)
        lines = [line for line in progress.warnings if "another scale than it saw" in line]
        report = json.loads((tmp_path / policy / "export_report.json").read_text())
        found = [use for use in report["policies"] if use["policy"] == NOT_AS_SOLVED]
        assert len(lines) == len(found) == said
    expert = "model.layers.0.mlp.experts.2"
    assert found[0]["quantizers"] == [
        f"{expert}.{leaf}_proj.input_quantizer" for leaf in ("gate", "up", "down")
    ]
    assert lines == [found[0]["detail"]]
    assert "gptq saw inputs under unseen=layer, and this export is under unseen=weights-only" in lines[0]
