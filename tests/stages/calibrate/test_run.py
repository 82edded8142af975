"""The calibrate stage: it goes on where it stopped, and reuses nothing that was made from something else."""

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stages.calibrate.run import calibrate
from stages.calibrate.summary import Summary
from stages.progress import Silent
from state.errors import IdentityMismatch, InputError, RunBusy, Stopped
from state.reader import open_run
from state.store import RunWriter
from tests.stages.calibrate import runs
from tests.stages.calibrate.runs import Crash, Interrupting, crash
from tests.stages.export import support

EVERY_BATCH = 1e-9  # seconds between commits: one after every batch


settings = partial(runs.settings, samples=16, batch=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("inputs")
    support.make_model(scratch / "model", support.config_of("qwen3_moe"))
    support.make_text(scratch / "text.jsonl")
    return scratch


def statistics(run: Path) -> dict[str, np.ndarray]:
    return dict(open_run(run).generation().arrays)


def assert_same_statistics(run: Path, other: Path) -> None:
    ours, theirs = statistics(run), statistics(other)
    assert ours.keys() == theirs.keys()
    for path, values in ours.items():
        assert values.tobytes() == theirs[path].tobytes(), path


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    calibrate(settings(inputs, run), Silent())
    return run


def test_summary(inputs: Path, tmp_path: Path) -> None:
    summary = calibrate(settings(inputs, tmp_path / "run"), Silent())
    assert isinstance(summary, Summary)
    assert (summary.tokens, summary.coverage.experts, summary.already_finished) == (512, 8, False)
    layers, attention, experts = (
        2,
        4 + 2,
        4 * 3,
    )  # inputs of q, k, v, o and K, V themselves; of three projections
    assert summary.coverage.sites == layers * (attention + 1 + experts) + 1  # and the router's; the head's
    assert open_run(tmp_path / "run").head.finished


@pytest.mark.parametrize("batches", [1, 4])
def test_after_a_crash_the_same_command_ends_the_same(
    inputs: Path, undisturbed: Path, tmp_path: Path, batches: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        calibrate(settings(inputs, run, commit_every=EVERY_BATCH), Interrupting(batches, crash))
    assert not open_run(run).head.finished
    calibrate(settings(inputs, run), Silent())
    assert_same_statistics(run, undisturbed)


def test_a_crash_before_the_first_commit(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        calibrate(settings(inputs, run), Interrupting(2, crash))
    assert open_run(run).head.generation is None
    calibrate(settings(inputs, run), Silent())
    assert_same_statistics(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_commits_what_is_done(inputs: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"2 of 6 batches committed") as error:
        calibrate(settings(inputs, run), Interrupting(2, lambda: signal.raise_signal(number)))
    assert error.value.exit_code == 75
    assert open_run(run).head.cursor.batch == 2
    assert signal.getsignal(number) == before
    calibrate(settings(inputs, run), Silent())
    assert_same_statistics(run, undisturbed)


def test_a_time_limit_commits_what_is_done_and_is_no_part_of_the_run(
    inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limited = settings(inputs, run, stop_after="1000s")
    with pytest.raises(Stopped, match=r"stopped by --stop-after 3s: \d of 6 batches committed"):
        calibrate(limited.model_copy(update={"stop_after": "3s"}), Interrupting(2, lambda: time.sleep(3)))
    calibrate(limited, Silent())
    assert_same_statistics(run, undisturbed)
    assert "stop_after" not in json.loads((run / "run.json").read_bytes())["settings"]


def test_a_stop_before_the_first_batch_leaves_nothing(inputs: Path, tmp_path: Path) -> None:
    asked = settings(inputs, tmp_path / "run", stop_after=0.001)
    with pytest.raises(Stopped, match=r"stopped by --stop-after 0\.001: nothing was committed yet in "):
        calibrate(asked, Silent())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replacement", [False, True], ids=["gone", "another"])
@pytest.mark.parametrize(
    "way", [{}, {"schedule": "layerwise", "activation_memory": 1}], ids=["whole", "layers"]
)
def test_a_run_that_is_moved_meanwhile_is_noticed(
    inputs: Path, undisturbed: Path, tmp_path: Path, replacement: bool, way: dict[str, object]
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"

    def move() -> None:
        run.rename(moved)
        if replacement:
            run.mkdir()

    with pytest.raises(InputError, match=f"{run} was moved to {moved} while") as error:
        calibrate(settings(inputs, run, commit_every=EVERY_BATCH, **way), Interrupting(3, move))
    assert error.value.exit_code == 2
    assert (list(run.iterdir()) if run.exists() else []) == []
    calibrate(settings(inputs, moved, **way), Silent())
    assert_same_statistics(moved, undisturbed)


def test_a_finished_run_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    calibrate(settings(inputs, run), Silent())
    before = {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "events.jsonl"
    }
    progress = Interrupting(1, crash)
    assert calibrate(settings(inputs, run, batch=4), progress).already_finished
    after = {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "events.jsonl"
    }
    assert before == after
    assert "finished" in progress.notes[-1]


def test_resume_never_and_required(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run at"):
        calibrate(settings(inputs, tmp_path / "run", resume="required"), Silent())
    calibrate(settings(inputs, tmp_path / "run"), Silent())
    with pytest.raises(InputError, match="exists already"):
        calibrate(settings(inputs, tmp_path / "run", resume="never"), Silent())


def test_other_content_is_refused_by_name(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(undisturbed, run)
    shutil.copytree(inputs / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(IdentityMismatch) as error:
        calibrate(settings(inputs, run, model=str(model), seq=16, samples=8), Silent())
    fields = {
        difference.field: (difference.stored, difference.current) for difference in error.value.differences
    }
    assert fields["config.rms_norm_eps"] == ("1e-06", "0.5")
    assert fields.keys() == {"config.rms_norm_eps", "tokens"}


def test_a_moved_model_and_touched_files_are_the_same_content(
    inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(inputs / "model", moved)
    (moved / "model.safetensors").touch()
    assert calibrate(settings(inputs, undisturbed, model=str(moved)), Silent()).already_finished


def test_another_environment_needs_consent(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        calibrate(settings(inputs, run, commit_every=EVERY_BATCH), Interrupting(3, crash))
    with pytest.raises(IdentityMismatch) as error:
        calibrate(settings(inputs, run, batch=4), Silent())
    assert [(d.field, d.stored, d.current) for d in error.value.differences] == [("batch", "3", "4")]
    progress = Interrupting(10**9, crash)
    calibrate(settings(inputs, run, batch=4, accept_environment=True), progress)
    assert [environment.batch for environment in open_run(run).head.accepted_environments] == [4]
    assert "another environment" in progress.warnings[0]


def test_tokens_stored_in_the_run_stand_in_for_lost_data(
    inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tmp_path / "text.jsonl"
    shutil.copy(inputs / "text.jsonl", data)
    with pytest.raises(Crash):
        calibrate(settings(inputs, run, data=str(data), commit_every=EVERY_BATCH), Interrupting(3, crash))
    data.unlink()
    progress = Interrupting(10**9, crash)
    calibrate(settings(inputs, run, data=str(data)), progress)
    assert any("tokens stored in" in note for note in progress.notes)
    assert_same_statistics(run, undisturbed)


def test_a_second_process_is_refused(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    with RunWriter.resume(run), pytest.raises(RunBusy):
        calibrate(settings(inputs, run), Silent())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"recipe": "nvfp4_svdquant"}, "'svdquant'"),
        (
            {"recipe": "int4_awq"},
            "self_attn.q_proj.weight has 64 input channels, which int4_awq blocks of 128",
        ),
        ({"device": "cuda:99"}, "DEVICE 'cuda:99'"),
        ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    inputs: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(settings(inputs, tmp_path / "run", **changes), Silent())
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_one_tensor_is_refused(inputs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors .* such as model\.layers\.1\.mlp\.gate\.weight"):
        calibrate(settings(inputs, tmp_path / "run", model=str(model)), Silent())


def test_a_source_that_is_only_said_to_be_quantized_is_refused(inputs: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"already quantized .*'fp8'\), and no tensor is"):
        calibrate(settings(inputs, tmp_path / "run", model=str(model)), Silent())
