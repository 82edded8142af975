"""Spoiled checkpoints: whatever the files of one hold, verify reports it or says in one clear line what is
wrong, and never takes it for whole where its configuration or headers say otherwise than before.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from stages.export.run import export
from stages.progress import Silent
from stages.settings import ExportSettings, VerifySettings
from stages.verify.run import verify
from state.errors import HoldfastError
from tests.fuzz.mutations import Mutation, spoil_bytes, spoil_header, spoil_json
from tests.stages.export import support
from tests.stages.verify.editable import copied

SECONDS = float(os.environ.get("HOLDFAST_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("HOLDFAST_FUZZ_SEED", "1"))

FILES: dict[str, tuple[Mutation, ...]] = {
    "config.json": (spoil_json, spoil_json, spoil_bytes),
    "hf_quant_config.json": (spoil_json, spoil_json, spoil_bytes),
    "model.safetensors": (spoil_header, spoil_bytes),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and its export out/, without Holdfast's own records."""
    folder = tmp_path_factory.mktemp("good")
    support.make_model(folder / "model", support.config_of("qwen3_moe", num_hidden_layers=1))
    support.make_run(folder / "run", folder / "model", support.make_text(folder / "text.jsonl"), samples=4)
    recipe = "general/ptq/nvfp4_default-kv_fp8"
    export(ExportSettings(run=folder / "run", out=folder / "export", recipe=recipe), Silent())
    copied(folder / "export", folder / "out")
    return folder


@pytest.mark.parametrize("file", FILES)
def test_a_spoiled_checkpoint_is_reported_or_refused(good: Path, tmp_path: Path, file: str) -> None:
    chance = random.Random(f"{SEED} {file}")
    end, tried, failures = time.monotonic() + SECONDS / len(FILES), 0, []
    while tried < 3 or time.monotonic() < end:
        tried += 1
        out = tmp_path / str(tried)
        shutil.copytree(good / "out", out)
        said = chance.choice(FILES[file])(out / file, chance)
        try:
            report = verify(VerifySettings(out=out, model=str(good / "model")), Silent())
            if file == "model.safetensors" and report.whole and not _the_same(good / "out", out):
                failures.append(f"{said}: taken for whole")
        except HoldfastError as error:
            if not str(error).strip():
                failures.append(f"{said}: unclear")
        except BaseException as error:
            failures.append(f"{said}: {type(error).__name__}: {str(error)[:200]}")
        shutil.rmtree(out)
    assert failures == []


def _the_same(one: Path, other: Path) -> bool:
    """Whether two checkpoints differ in nothing but metadata and codes, which may change a little unseen."""
    ours, theirs = support.tensors(one), support.tensors(other)
    return {name: seen.split()[0] for name, seen in ours.items()} == {
        name: seen.split()[0] for name, seen in theirs.items()
    }
