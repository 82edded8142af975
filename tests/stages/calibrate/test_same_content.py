"""Nothing is measured but what the run's identity names: files that change meanwhile, files that are not
digested, other machines, and hidden states of an earlier process.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.calibrate import prepare
from stages.calibrate.forward.layers import LayerwiseForward
from stages.calibrate.run import calibrate
from stages.calibrate.schedule import whole
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from state.errors import DamagedStore, HoldfastError, IdentityMismatch, InputError
from state.head import Head
from state.large_reads import LargeReads
from state.reader import open_run
from state.source import Source
from state.store import RunWriter
from state.update import Update
from tests.stages.calibrate import runs
from tests.stages.calibrate.runs import Crash, Interrupting, crash
from tests.stages.export import support
from tests.stages.model.changing import overwrite, replace

EVERY_BATCH = 1e-9  # seconds between commits: one after every batch
FILES = {"schedule": "layerwise", "activation_memory": 1}
NEVER = 10**9

settings = partial(runs.settings, samples=16, batch=3)


class AtStage(Silent):
    """Does something when a part of the work begins."""

    def __init__(self, title: str, action: Callable[[], object]) -> None:
        self.title, self.action = title, action

    def stage(self, title: str) -> None:
        if title.startswith(self.title):
            self.action()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    support.make_model(tmp_path / "model", support.config_of("qwen3_moe"))
    support.make_text(tmp_path / "text.jsonl")
    return tmp_path


def statistics(run: Path) -> dict[str, bytes]:
    return {path: values.tobytes() for path, values in open_run(run).generation().arrays.items()}


def tokens_of(run: Path) -> dict[str, list[int]]:
    """Tokens that each plain linear saw, by the array's name."""
    generation = open_run(run).generation()
    return {
        array.key: generation.arrays[f"tokens/{array.key}"].reshape(-1).tolist()
        for array in generation.layout.arrays
        if array.role == "input" and array.experts is None
    }


def refused(wish: CalibrateSettings, progress: Silent) -> HoldfastError:
    with pytest.raises(HoldfastError) as error:
        calibrate(wish, progress)
    return error.value


CHANGES = {"in place": overwrite, "another file": replace}
MOMENTS: dict[str, Callable[[Callable[[], object]], Silent]] = {
    "before loading": partial(AtStage, "loading "),
    "while calibrating": partial(Interrupting, 3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("schedule", ["whole", "layerwise"])
def test_weights_that_change_meanwhile_stop_the_run(
    inputs: Path, schedule: str, moment: str, change: str
) -> None:
    """Of what was committed nothing is of other weights, and with the old ones the end is as ever."""
    wish = partial(settings, inputs, schedule=schedule, commit_every=EVERY_BATCH)
    calibrate(wish(inputs / "undisturbed"), Silent())
    weights = inputs / "model" / "model.safetensors"
    shutil.copy(weights, inputs / "kept")
    entry = Source.open(inputs / "model").tensors["model.layers.1.self_attn.q_proj.weight"]
    progress = MOMENTS[moment](lambda: CHANGES[change](weights, entry.start, b"\x80\x3f" * 64))
    if isinstance(progress, AtStage) and schedule == "layerwise":
        progress.title = "one layer of"
    error = refused(wish(inputs / "run"), progress)
    assert isinstance(error, IdentityMismatch) and error.exit_code == 3
    assert str(weights) in str(error)
    assert not open_run(inputs / "run").head.finished
    assert refused(wish(inputs / "run"), Silent()).exit_code == 3  # the content is another now
    shutil.copy(inputs / "kept", weights)
    calibrate(wish(inputs / "run"), Silent())
    assert statistics(inputs / "run") == statistics(inputs / "undisturbed")


def test_weights_that_change_while_they_are_digested(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is begun with an identity that is half of one file and half of another."""
    weights = inputs / "model" / "model.safetensors"

    def digest_and_overwrite(source: Source, name: str) -> str:
        overwrite(weights, source.tensors[name].start, b"\x80\x3f")
        return "BF16[1] xxh3:0"

    monkeypatch.setattr(Source, "digest", digest_and_overwrite)
    error = refused(settings(inputs, inputs / "run"), Silent())
    assert error.exit_code == 3 and str(weights) in str(error)
    assert not (inputs / "run").exists()


def test_weights_that_change_while_they_are_exported(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(settings(inputs, inputs / "run"), Silent())
    weights = inputs / "model" / "model.safetensors"
    out = inputs / "out"
    read = LargeReads.read

    def read_and_overwrite(files: LargeReads, path: Path, start: int, into: memoryview) -> None:
        read(files, path, start, into)
        overwrite(weights, start, b"\x80\x3f")

    monkeypatch.setattr(LargeReads, "read", read_and_overwrite)
    with pytest.raises(IdentityMismatch, match=r"model\.safetensors has changed while it was worked from"):
        export(ExportSettings(run=inputs / "run", out=out), Silent())
    assert not out.exists()


def change_config(inputs: Path, **changes: Any) -> None:
    path = inputs / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_takes_the_weights_from_another_file(inputs: Path) -> None:
    shutil.copy(inputs / "model" / "model.safetensors", inputs / "model" / "other.safetensors")
    change_config(inputs, transformers_weights="other.safetensors")
    error = refused(settings(inputs, inputs / "run"), Silent())
    assert isinstance(error, InputError)
    assert "'other.safetensors' (transformers_weights), and Holdfast reads model.safetensors" in str(error)


def test_an_index_beside_the_weights_changes_nothing(inputs: Path) -> None:
    calibrate(settings(inputs, inputs / "run"), Silent())
    (inputs / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "y.safetensors"}}')
    assert calibrate(settings(inputs, inputs / "run"), Silent()).already_finished


MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .scales import SCALE

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids, **kwargs):
        return super().forward(inputs_embeds=self.model.embed_tokens(input_ids) * SCALE, **kwargs)
"""
CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def coded(inputs: Path) -> Path:
    """A model that brings its own code."""
    model = support.make_model(inputs / "model", support.config_of("llama"))
    (model / "modeling_own.py").write_text(MODELING)
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "scales.py").write_text("SCALE = 2.0\n")
    (model / "unrelated.py").write_text("raise SystemExit\n")
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    change_config(inputs, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return inputs


def test_code_that_comes_with_a_model_is_part_of_the_identity(coded: Path) -> None:
    wish = settings(coded, coded / "run", trust_remote_code=True, recipe="fp8")
    calibrate(wish, Silent())
    code = open_run(coded / "run").record.identity.code
    assert sorted(code) == ["configuration_own.py", "modeling_own.py", "scales.py"]
    (coded / "model" / "unrelated.py").write_text("")
    assert calibrate(wish, Silent()).already_finished
    (coded / "model" / "scales.py").write_text("SCALE = 3.0\n")
    # As in another process: transformers keeps to the class that it saw first for a configuration.
    AutoModelForCausalLM._model_mapping._extra_content.clear()
    error = refused(wish, Silent())
    assert isinstance(error, IdentityMismatch)
    assert [difference.field for difference in error.differences] == ["code.scales.py"]
    with pytest.raises(IdentityMismatch, match=r"code\.scales\.py: stored xxh3:\w+, now xxh3:") as exported:
        export(ExportSettings(run=coded / "run", out=coded / "out", trust_remote_code=True), Silent())
    assert [difference.field for difference in exported.value.differences] == ["code.scales.py"]


def test_another_instruction_set_is_another_environment(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = partial(settings, inputs, inputs / "run", commit_every=EVERY_BATCH)
    with pytest.raises(Crash):
        calibrate(wish(), Interrupting(3, crash))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    error = refused(wish(), Silent())
    assert isinstance(error, IdentityMismatch)
    assert [difference.field for difference in error.differences] == ["cpu", "libraries"]
    calibrate(wish(accept_environment=True), Silent())
    assert open_run(inputs / "run").head.finished


def test_a_run_of_an_older_version_goes_on_and_is_told_of(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = settings(inputs, inputs / "run", commit_every=EVERY_BATCH)
    with monkeypatch.context() as older, pytest.raises(Crash):
        now = prepare.environment
        older.setattr(
            prepare,
            "environment",
            lambda *arguments: now(*arguments).model_copy(update={"cpu": "", "libraries": ""}),
        )
        calibrate(wish, Interrupting(3, crash))
    assert "cpu" not in json.loads((inputs / "run" / "run.json").read_text())["environment"]
    progress = Interrupting(NEVER, crash)
    calibrate(wish, progress)
    assert any("did not record cpu and libraries" in note for note in progress.notes)
    assert open_run(inputs / "run").head.finished


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("schedule", ["whole", "layerwise"])
def test_another_batch_skips_and_repeats_nothing(inputs: Path, schedule: str, batch: int) -> None:
    wish = partial(settings, inputs, inputs / "run", activation_memory=1, schedule=schedule)
    with pytest.raises(Crash):
        calibrate(wish(commit_every=EVERY_BATCH), Interrupting(8 if schedule == "layerwise" else 4, crash))
    cursor = open_run(inputs / "run").head.cursor
    assert cursor.layer == 1 if schedule == "layerwise" else cursor.batch > 0
    progress = Interrupting(NEVER, crash)
    calibrate(wish(batch=batch, accept_environment=True), progress)
    found = tokens_of(inputs / "run")
    assert len(found) > 3
    assert all(
        set(counts if isinstance(counts, list) else [counts]) == {16 * 32} for counts in found.values()
    )
    assert any("batch: 3, now" in said for said in progress.warnings) == (schedule == "layerwise")


def test_statistics_that_lack_tokens_are_never_finished(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(NEVER))

    def skipping(model: Any, windows: torch.Tensor) -> None:
        forward(model, windows[1:] if next(numbers) == 3 else windows)

    forward = whole.forward
    monkeypatch.setattr(whole, "forward", skipping)
    error = refused(settings(inputs, inputs / "run", schedule="whole", commit_every=EVERY_BATCH), Silent())
    assert isinstance(error, DamagedStore)
    held = re.search(r"layer 0 hold (\d+) tokens \(of model\S+\), but (\d+) went through", str(error))
    assert held and int(held[2]) - int(held[1]) == 32
    head = open_run(inputs / "run").head
    assert not head.finished and head.cursor.batch <= 3


def started_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers at which forwards start from here on."""
    layers: list[int] = []
    start = LayerwiseForward.start

    def recording(forward: LayerwiseForward, layer: int = 0) -> int:
        layers.append(start(forward, layer))
        return layers[-1]

    monkeypatch.setattr(LayerwiseForward, "start", recording)
    return layers


@pytest.mark.parametrize("layer", [1, 2])
def test_a_kill_in_the_commit_of_a_layer_costs_that_layer_alone(
    inputs: Path, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.make_model(inputs / "model", support.config_of("qwen3_moe", num_hidden_layers=3))
    calibrate(settings(inputs, inputs / "undisturbed", **FILES), Silent())

    def commit(writer: RunWriter, update: Update) -> Head:
        if update.cursor.layer == layer + 1:
            raise Crash
        return whole_commit(writer, update)

    whole_commit = RunWriter.commit
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(RunWriter, "commit", commit)
        calibrate(settings(inputs, inputs / "run", **FILES), Silent())
    assert open_run(inputs / "run").head.cursor.layer == layer
    layers = started_at(monkeypatch)
    calibrate(settings(inputs, inputs / "run", **FILES), Silent())
    assert layers == [layer]
    assert statistics(inputs / "run") == statistics(inputs / "undisturbed")
    assert not (inputs / "run" / "activations").exists()


@pytest.mark.parametrize("file", ["000001.json", "000001.raw"])
def test_a_bit_of_the_hidden_states_costs_time_alone(
    inputs: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(settings(inputs, inputs / "undisturbed", **FILES), Silent())
    places = np.random.default_rng(0).random(2)
    for number, place in enumerate(places):
        run = inputs / f"run-{number}"
        with pytest.raises(Crash):
            calibrate(settings(inputs, run, **FILES), Interrupting(8, crash))
        path = run / "activations" / "hidden" / file
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 1 << number
        path.write_bytes(data)
        progress = Interrupting(NEVER, crash)
        with monkeypatch.context() as patch:
            layers = started_at(patch)
            calibrate(settings(inputs, run, **FILES), progress)
        assert layers == [0]
        assert "hidden states before layer 1 can't be used" in progress.warnings[0]
        assert statistics(run) == statistics(inputs / "undisturbed")
