"""Whatever a run is made from, changed by a bit, is refused by name; whatever it is not made from is not
noticed.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stages.calibrate.run import calibrate
from stages.progress import Silent
from state.errors import IdentityMismatch
from state.source import Source
from tests.stages.calibrate import runs
from tests.stages.export import support

WISH: dict[str, Any] = {"samples": 4, "seq": 16, "batch": 2, "recipe": "fp8"}
CONFIG = {
    "rms_norm_eps": 0.5,
    "hidden_act": "gelu",
    "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"},
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its text and a finished run."""
    folder = tmp_path_factory.mktemp("calibrated")
    support.make_model(folder / "model", support.config_of("llama", num_hidden_layers=1))
    support.make_text(folder / "text.jsonl")
    calibrate(runs.settings(folder, folder / "run", **WISH), Silent())
    return folder


def copy_of(calibrated: Path, number: int) -> Path:
    """The model and the text at another place, with other times."""
    copy = calibrated.parent / f"copy-{number}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(calibrated / "model", copy / "model")
    shutil.copy(calibrated / "text.jsonl", copy)
    return copy


def change_config(copy: Path, choice: int) -> str:
    name, value = list(CONFIG.items())[choice % len(CONFIG)]
    path = copy / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    return f"config.{name}"


def change_tokenizer(copy: Path, choice: int) -> str:
    name = ("tokenizer.json", "tokenizer_config.json")[choice % 2]
    path = copy / "model" / name
    path.write_text(path.read_text() + " ")
    return f"tokenizer.{name}"


def flip_bit_of_weights(copy: Path, choice: int) -> str:
    source = Source.open(copy / "model")
    entries = [entry for entry in source.tensors.values() if entry.nbytes]
    entry = entries[choice % len(entries)]
    path = copy / "model" / entry.file
    data = bytearray(path.read_bytes())
    data[entry.start + choice % entry.nbytes] ^= 1 << choice % 8
    path.write_bytes(data)
    return f"tensors.{entry.name}"


def change_text(copy: Path, choice: int) -> str:
    path = copy / "text.jsonl"
    first, rest = path.read_text().split("\n", 1)
    words = json.loads(first)["text"].split()
    place = choice % len(words)
    words[place] = "w1" if words[place] != "w1" else "w2"
    path.write_text(json.dumps({"text": " ".join(words)}) + "\n" + rest)
    return "tokens"


MATTERS = {
    "config": change_config,
    "tokenizer": change_tokenizer,
    "weights": flip_bit_of_weights,
    "text": change_text,
}


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(sorted(MATTERS)), choice=st.integers(0, 10_000))
def test_any_one_input_that_matters_is_named(calibrated: Path, kind: str, choice: int) -> None:
    copy = copy_of(calibrated, 0)
    field = MATTERS[kind](copy, choice)
    with pytest.raises(IdentityMismatch) as refused:
        calibrate(runs.settings(copy, calibrated / "run", **WISH), Silent())
    assert refused.value.exit_code == 3
    (difference,) = refused.value.differences
    assert difference.field.startswith(field) and difference.field in str(refused.value)


@pytest.mark.parametrize("change", [{"seq": 17}, {"samples": 3}], ids=str)
def test_the_number_of_tokens_matters(calibrated: Path, change: dict[str, int]) -> None:
    with pytest.raises(IdentityMismatch) as refused:
        calibrate(runs.settings(calibrated, calibrated / "run", **(WISH | change)), Silent())
    assert [difference.field for difference in refused.value.differences] == ["tokens"]


def reshard(copy: Path) -> None:
    single = copy / "model" / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = list(tensors)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, single.with_name(file), {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = copy / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def respell_config(copy: Path) -> None:
    path = copy / "model" / "config.json"
    content = json.loads(path.read_text()) | {"transformers_version": "4.0", "_name_or_path": "elsewhere"}
    path.write_text(json.dumps(dict(reversed(content.items()))))


def set_times_back(copy: Path) -> None:
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))


def add_other_files(copy: Path) -> None:
    (copy / "model" / "README.md").write_text("other")
    (copy / "model" / "extra.py").write_text("raise SystemExit\n")
    (copy / "model" / "generation_config.json").write_text("{}")


DOES_NOT_MATTER = {
    "resharded": reshard,
    "config respelled": respell_config,
    "times": set_times_back,
    "other files": add_other_files,
}
OPTIONS = {
    "recipe": st.just("nvfp4"),
    "batch": st.integers(1, 5),
    "commit_every": st.floats(0.1, 100),
    "schedule": st.sampled_from(["auto", "whole", "layerwise"]),
    "activation_memory": st.integers(1, 100),
}


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.sets(st.sampled_from(sorted(DOES_NOT_MATTER))),
    options=st.fixed_dictionaries({}, optional=OPTIONS),
    level=st.sampled_from([logging.DEBUG, logging.CRITICAL]),
    processors=st.integers(1, 8),
)
def test_what_does_not_matter_is_not_noticed(
    calibrated: Path, changes: set[str], options: dict[str, Any], level: int, processors: int
) -> None:
    copy = copy_of(calibrated, 1)
    for change in sorted(changes):
        DOES_NOT_MATTER[change](copy)
    before = logging.getLogger().level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: processors)
        logging.getLogger().setLevel(level)
        try:
            summary = calibrate(runs.settings(copy, calibrated / "run", **(WISH | options)), Silent())
        finally:
            logging.getLogger().setLevel(before)
    assert summary.already_finished
