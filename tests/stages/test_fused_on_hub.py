"""A checkpoint whose experts are fused on the hub, and the same weights expert by expert: the same
statistics, the same solutions and the same exported tensors.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from tests.families.qwen_vl import qwen3_5
from tests.families.tokenizer import write_text
from tests.families.write import write_family

EXPERTS, WIDTH = 4, 96
FUSED = ("model.language_model.layers.0.mlp.experts", "model.language_model.layers.1.mlp.experts")
GPTQ = "general/ptq/nvfp4_default-kv_none-gptq"


def split(folder: Path, out: Path) -> None:
    """The folder's copy, in which every expert of the decoder layers has tensors of its own."""
    shutil.copytree(folder, out)
    weights = load_file(folder / "model.safetensors")
    for experts in FUSED:
        both, down = weights.pop(f"{experts}.gate_up_proj"), weights.pop(f"{experts}.down_proj")
        for number in range(EXPERTS):
            gate, up = both[number].chunk(2)
            weights[f"{experts}.{number}.gate_proj.weight"] = gate.clone()
            weights[f"{experts}.{number}.up_proj.weight"] = up.clone()
            weights[f"{experts}.{number}.down_proj.weight"] = down[number].clone()
    save_file(weights, out / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The fused and the split model, with up ten times as large as gate: taken for one another, they would
    show.
    """
    folder = tmp_path_factory.mktemp("fused")
    write_text(folder / "text.jsonl")
    weights = write_family(qwen3_5(moe=True), folder / "fused")
    for experts in FUSED:
        assert weights[f"{experts}.gate_up_proj"].shape[:2] == (EXPERTS, 2 * WIDTH)
        weights[f"{experts}.gate_up_proj"][:, WIDTH:] *= 10
    save_file(weights, folder / "fused" / "model.safetensors")
    split(folder / "fused", folder / "split")
    return folder / "fused", folder / "split"


def calibrated(model: Path, schedule: str, recipe: str) -> Path:
    run = model.parent / f"{model.name}-{schedule}-{Path(recipe).name}"
    data = str(model.parent / "text.jsonl")
    calibrate(
        CalibrateSettings(
            model=str(model),
            data=data,
            run=run,
            samples=8,
            seq=32,
            batch=4,
            recipe=recipe,
            schedule=schedule,  # type: ignore[arg-type]
        ),
        Silent(),
    )
    return run


def store(run: Path) -> dict[str, bytes]:
    """Every file of the run's statistics and solutions; proofs of folding without where experts lie."""
    root = run / "calibration.zarr"
    found = {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }
    for name, content in found.items():
        if name.startswith("solutions/") and b'"proof"' in content:
            attributes = json.loads(content)
            proof = attributes["attributes"]["proof"]
            del proof["kind"]  # a digest of all operands
            for site in proof["sites"]:
                for part in (*site["sources"], *site["consumers"]):
                    if ".experts.E." in part["module"]:
                        for lying in ("tensor", "shape", "first", "period", "expert"):
                            del part[lying]
            found[name] = json.dumps(attributes).encode()
    return found


def exported(run: Path, recipe: str, name: str = "out") -> Path:
    out = run.parent / f"{run.name}-{name}"
    export(ExportSettings(run=run, out=out, recipe=recipe), Silent())
    return out


@pytest.mark.parametrize(
    ("schedule", "recipe"), [("whole", "nvfp4"), ("layerwise", "nvfp4_awq_full"), ("layerwise", GPTQ)]
)
def test_fused_and_split_give_the_same(folders: tuple[Path, Path], schedule: str, recipe: str) -> None:
    fused, apart = (calibrated(model, schedule, recipe) for model in folders)
    assert store(fused) == store(apart)
    recipes = [recipe] if recipe != "nvfp4" else ["nvfp4", "fp8"]
    for each in recipes:
        left, right = (exported(run, each, Path(each).name) for run in (fused, apart))
        found, expected = (load_file(out / "model.safetensors") for out in (left, right))
        assert found.keys() == expected.keys()
        assert [name for name in found if not same(found[name], expected[name])] == []
        for file in ("config.json", "hf_quant_config.json"):
            assert json.loads((left / file).read_text()) == json.loads((right / file).read_text())
        up = found[f"{FUSED[0]}.2.up_proj.weight"]
        assert not same(up, found[f"{FUSED[0]}.2.gate_proj.weight"])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        if one.dim()
        else torch.equal(one, other)
    )


def test_a_kept_plan_holds_where_fused_experts_lie(folders: tuple[Path, Path]) -> None:
    run = calibrated(folders[0], "whole", "fp8")
    first = exported(run, "fp8", "made")
    (kept,) = (run / "plans").iterdir()
    matrices = json.loads(kept.read_text().partition("\n")[2])["matrices"]
    assert matrices[f"{FUSED[0]}.3.up_proj"] == {
        "tensor": f"{FUSED[0]}.gate_up_proj",
        "expert": 3,
        "transposed": False,
        "first": WIDTH,
        "stride": 1,
        "count": WIDTH,
    }
    again = exported(run, "fp8", "again")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
