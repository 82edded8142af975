"""Spoiled inputs: whatever a file holds, the command works or says in one clear line what is wrong with it.

`HOLDFAST_FUZZ_SECONDS=600 HOLDFAST_FUZZ_SEED=7 pytest tests/fuzz` looks longer, and elsewhere.
"""

import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from stages.calibrate.run import calibrate
from stages.progress import Silent
from stages.settings import CalibrateSettings
from state.errors import HoldfastError
from tests.fuzz.mutations import Mutation, spoil_bytes, spoil_header, spoil_json, spoil_lines
from tests.stages.export import support

SECONDS = float(os.environ.get("HOLDFAST_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("HOLDFAST_FUZZ_SEED", "1"))
LONGEST = 5.0  # seconds of a trial

FILES: dict[str, tuple[Mutation, ...]] = {
    "model/config.json": (spoil_json, spoil_json, spoil_bytes),
    "model/tokenizer.json": (spoil_json, spoil_bytes),
    "model/tokenizer_config.json": (spoil_json, spoil_bytes),
    "model/model.safetensors": (spoil_header, spoil_bytes),
    "sharded/model.safetensors.index.json": (spoil_json, spoil_bytes),
    "text.jsonl": (spoil_lines, spoil_bytes),
    "text.parquet": (spoil_bytes,),
    "text.txt": (spoil_bytes,),
}
CODE = "open({marker!r}, 'w').write('executed')\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, whole and sharded, with code that nobody may run, and data in every form."""
    folder = tmp_path_factory.mktemp("inputs")
    support.make_model(folder / "model", support.config_of("qwen3_moe"))
    support.make_text(folder / "text.jsonl")
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    (folder / "text.txt").write_text("\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
    (folder / "model/modeling_own.py").write_text(CODE.format(marker=str(folder / "executed")))
    shutil.copytree(folder / "model", folder / "sharded")
    (folder / "sharded/model.safetensors").rename(folder / "sharded/model-1.safetensors")
    header = (folder / "sharded/model-1.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    index = {"weight_map": {name: "model-1.safetensors" for name in names if name != "__metadata__"}}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("file", FILES)
def test_a_spoiled_input_is_one_clear_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    forbid(monkeypatch)
    chance = random.Random(f"{SEED} {file}")
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    end, tried, worked, failures = time.monotonic() + SECONDS / len(FILES), 0, 0, []
    while tried < 3 or time.monotonic() < end:
        tried += 1
        trial = tmp_path / str(tried)
        shutil.copytree(inputs, trial)
        said = chance.choice(FILES[file])(trial / file, chance)
        began = time.process_time()
        try:
            calibrate(asked(trial, file), Silent())
            worked += 1
        except HoldfastError as error:
            if not clear(str(error), trial):
                failures.append(f"{said}: unclear: {error}")
        except BaseException as error:
            failures.append(f"{said}: {type(error).__name__}: {str(error)[:200]}")
        if (took := time.process_time() - began) > LONGEST:
            failures.append(f"{said}: took {took:.1f} s")
        shutil.rmtree(trial)
    print(f"{file}: {tried} tried, {worked} worked")
    assert failures == []
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == []


def asked(trial: Path, file: str) -> CalibrateSettings:
    folder, _, _ = file.rpartition("/")
    model, data = trial / (folder or "model"), trial / ("text.jsonl" if folder else file)
    return CalibrateSettings(
        model=str(model), data=str(data), run=trial / "run", samples=2, seq=16, batch=2, device="cpu"
    )


def clear(message: str, trial: Path) -> bool:
    """A message that says something, in a line or a few, without control characters."""
    own = message.replace(str(trial), "")
    return bool(own.strip()) and len(own) < 2000 and own.replace("\n", "").isprintable()


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a model folder holds may be unpickled."""

    def unpickle(*_given: object, **_named: object) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, unpickle)
