"""Exports whose scales were folded into norms, beside their source."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from tests.stages.export import support
from tests.stages.verify.editable import Editable, damaged, verified
from tests.stages.verify.edits import swap, times

LAYER = "model.layers.1"
RECIPE = "nvfp4_awq_lite"


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, a mixture of experts, and out/, AWQ's export which scales
    what a router reads, too.
    """
    folder = tmp_path_factory.mktemp("solved")
    support.make_model(folder / "model", support.config_of("qwen3_moe"))
    text = support.make_text(folder / "text.jsonl")
    asked = {"model": str(folder / "model"), "data": str(text), "run": folder / "run", "recipe": RECIPE}
    calibrate(CalibrateSettings(**asked, samples=16, seq=32, batch=4), Silent())
    export(ExportSettings(run=folder / "run", out=folder / "out"), Silent())
    return folder


def test_folded_scales_are_the_sources_weights(solved: Path, tmp_path: Path) -> None:
    out = damaged(solved / "out", tmp_path / "out", lambda content: None)
    before, after = (Editable.read_tensors(solved / name) for name in ("model", "out"))
    assert not before[f"{LAYER}.mlp.gate.weight"].equal(after[f"{LAYER}.mlp.gate.weight"])
    assert verified(out, model=str(solved / "model")).findings == ()


@pytest.mark.parametrize(
    ("edit", "rule", "name"),
    [
        (
            swap(f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"),
            "source-changed",
            f"{LAYER}.input_layernorm.weight",
        ),
        (swap("model.norm", f"{LAYER}.input_layernorm"), "source-changed", "model.norm.weight"),
        (times(f"{LAYER}.mlp.gate.weight", factor=2.0), "source-changed", f"{LAYER}.mlp.gate.weight"),
        (
            times(f"{LAYER}.self_attn.q_proj.weight_scale_2", factor=4.0),
            "source-weights",
            f"{LAYER}.self_attn.q_proj",
        ),
        (
            swap(f"{LAYER}.mlp.experts.0", f"{LAYER}.mlp.experts.1"),
            "source-weights",
            f"{LAYER}.mlp.experts.0.up_proj",
        ),
    ],
    ids=[
        "norms swapped",
        "the last norm swapped",
        "a router doubled",
        "a scale of four times",
        "experts swapped",
    ],
)
def test_damage_to_them_is_found(
    solved: Path, tmp_path: Path, edit: Callable[[Editable], None], rule: str, name: str
) -> None:
    out = damaged(solved / "out", tmp_path / "out", edit)
    found = verified(out, model=str(solved / "model")).findings
    assert (rule, name) in {(finding.rule, finding.name) for finding in found}
