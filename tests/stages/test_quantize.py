"""Both stages as one command: the end is that of the two, whatever comes between; and what is foreseeable is
refused before anything is measured.
"""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from stages.calibrate.one_pass import Pass
from stages.calibrate.run import calibrate
from stages.commands import quantize_command
from stages.export.folder import ExportFolder
from stages.export.run import export
from stages.progress import Silent
from stages.quantize import quantize
from stages.settings import CalibrateSettings, ExportSettings, QuantizeSettings
from state.durable import Disk
from state.errors import HoldfastError, IdentityMismatch, InputError, RunBusy, Stopped
from state.reader import open_run
from tests.stages.calibrate.runs import Crash, Interrupting, crash
from tests.stages.export import support
from tests.stages.export.kill_driver import tree

SIZES: dict[str, Any] = {"samples": 8, "seq": 32, "batch": 2, "commit_every": 1e-9}
SHARD = {"shard_size": 20_000}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `text.jsonl`."""
    scratch = tmp_path_factory.mktemp("inputs")
    support.make_model(scratch / "model", support.config_of("qwen3_moe"))
    support.make_text(scratch / "text.jsonl")
    return scratch


@pytest.fixture(scope="module")
def two_commands(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out-run` and `out`, made by the two stages."""
    scratch = tmp_path_factory.mktemp("two")
    run = scratch / "out-run"
    given = {"model": str(inputs / "model"), "data": str(inputs / "text.jsonl")}
    calibrate(CalibrateSettings(**given, run=run, **SIZES), Silent())
    export(ExportSettings(run=run, out=scratch / "out", **SHARD))
    return scratch


def asked(inputs: Path, folder: Path, **changes: Any) -> QuantizeSettings:
    given = {"model": str(inputs / "model"), "data": str(inputs / "text.jsonl"), "out": folder / "out"}
    return QuantizeSettings(**given | SIZES | SHARD | changes)


def assert_same_end(folder: Path, two_commands: Path) -> None:
    assert tree(folder / "out") == tree(two_commands / "out")
    ours, theirs = open_run(folder / "out-run"), open_run(two_commands / "out-run")
    assert ours.head.finished
    assert ours.record.settings | {"run": ""} == theirs.record.settings | {"run": ""}
    assert ours.record.identity == theirs.record.identity
    expected = theirs.generation().arrays
    found = ours.generation().arrays
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []


def after_a_shard(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once an export has written its first shard."""
    write_shard = ExportFolder.write_shard

    def write(self: ExportFolder, *given: Any) -> None:
        write_shard(self, *given)
        action()

    monkeypatch.setattr(ExportFolder, "write_shard", write)


def test_the_end_is_that_of_the_two_commands(inputs: Path, two_commands: Path, tmp_path: Path) -> None:
    done = quantize(asked(inputs, tmp_path), Silent())
    assert done.calibration is not None
    assert (done.calibration.tokens, done.calibration.already_finished) == (256, False)
    assert done.export.shards_written == len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_end(tmp_path, two_commands)
    again = quantize(asked(inputs, tmp_path), Silent())
    assert again.calibration is not None and again.calibration.already_finished
    assert again.export.already_finished
    assert_same_end(tmp_path, two_commands)


def test_the_run_serves_other_formats(inputs: Path, two_commands: Path, tmp_path: Path) -> None:
    run = two_commands / "out-run"
    done = quantize(asked(inputs, tmp_path, run=run, recipe="fp8"), Silent())
    assert done.calibration is not None and done.calibration.already_finished
    export(ExportSettings(run=run, out=tmp_path / "other", recipe="fp8", **SHARD))
    assert tree(tmp_path / "out") == tree(tmp_path / "other")
    assert not (tmp_path / "out-run").exists()


def test_a_model_that_has_moved_is_exported_from_where_it_is(
    inputs: Path, two_commands: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(inputs / "model")
    quantize(asked(inputs, tmp_path, run=two_commands / "out-run", model=str(tmp_path / "moved")), Silent())
    assert tree(tmp_path / "out") == tree(two_commands / "out")


def test_killed_while_it_calibrates(inputs: Path, two_commands: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        quantize(asked(inputs, tmp_path), Interrupting(2, crash))
    assert not open_run(tmp_path / "out-run").head.finished
    done = quantize(asked(inputs, tmp_path), Silent())
    assert done.calibration is not None and done.calibration.tokens < 256
    assert_same_end(tmp_path, two_commands)


def test_killed_while_it_exports(
    inputs: Path, two_commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        after_a_shard(crash, patch)
        quantize(asked(inputs, tmp_path), Silent())
    assert not (tmp_path / "out").exists()
    done = quantize(asked(inputs, tmp_path), Silent())
    assert done.calibration is not None and done.calibration.already_finished
    assert done.export.shards_kept == 1
    assert_same_end(tmp_path, two_commands)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_stopped_while_it_calibrates(inputs: Path, two_commands: Path, tmp_path: Path) -> None:
    settings = asked(inputs, tmp_path)
    with pytest.raises(Stopped) as stopped:
        quantize(settings, Interrupting(2, terminate))
    said = f"committed in {tmp_path / 'out-run'}; the same command goes on from there: holdfast quantize "
    assert str(stopped.value).startswith("stopped by SIGTERM: ") and said in str(stopped.value)
    assert str(stopped.value).endswith(quantize_command(settings))
    assert not open_run(tmp_path / "out-run").head.finished
    quantize(settings, Silent())
    assert_same_end(tmp_path, two_commands)


def test_stopped_while_it_exports(
    inputs: Path, two_commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = asked(inputs, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        after_a_shard(terminate, patch)
        quantize(settings, Silent())
    assert str(stopped.value) == (
        "stopped by SIGTERM: what was written before is untouched; the same command goes on from there: "
        + quantize_command(settings)
    )
    assert not (tmp_path / "out").exists()
    assert quantize(settings, Silent()).export.shards_kept == 1
    assert_same_end(tmp_path, two_commands)


def test_a_stop_that_came_with_the_last_commit_is_heeded_before_the_export(
    inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        quantize(asked(inputs, tmp_path), Interrupting(4, terminate))
    assert open_run(tmp_path / "out-run").head.finished
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out-run"]


def test_the_time_limit_holds_for_the_export_too(
    inputs: Path, two_commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = asked(inputs, tmp_path, run=two_commands / "out-run", stop_after="1h")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped by --stop-after 1h: "):
        patch.setattr("stages.calibrate.run.seconds", lambda _: 1e-3)
        patch.setattr("stages.quantize.calibrate", lambda *_: None)
        quantize(settings, Silent())
    assert not (tmp_path / "out").exists()


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("something is measured")

    monkeypatch.setattr(Pass, "run", fail)


def a_file(folder: Path) -> None:
    (folder / "out").write_text("mine")


def of_somebody(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")


def partial_of_somebody(folder: Path) -> None:
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / "notes.txt").write_text("mine")


def untouched(_: Path) -> None:
    """Nothing is there."""


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (a_file, {}, "out is a file; OUT must be a folder"),
        (of_somebody, {}, "out exists and is no export of Holdfast"),
        (of_somebody, {"overwrite": True}, "out exists and is no export of Holdfast"),
        (partial_of_somebody, {}, "out.partial exists and is not Holdfast's unfinished export to out"),
        (untouched, {"run": "out"}, "the run .*out would be inside .*out, which is the checkpoint's alone"),
        (untouched, {"run": "out/run"}, "would be inside"),
        (untouched, {"run": "out.partial/run"}, "would be inside"),
        (untouched, {"recipe": "nvfp5"}, "no recipe is called 'nvfp5'"),
        (untouched, {"recipe": "fp8", "scales": "mse"}, "--scales mse has nothing to act on"),
        (untouched, {"mxfp4_scale": "cast"}, "--mxfp4-scale cast has nothing to act on"),
        (untouched, {"recipe": "nvfp4_awq_full", "fold": "none"}, "can't be exported with --fold none"),
        (untouched, {"revision": "main"}, "leave --revision out"),
    ],
)
def test_what_export_would_refuse_is_refused_before(
    inputs: Path,
    tmp_path: Path,
    prepare: Callable[[Path], None],
    changes: dict[str, Any],
    message: str,
) -> None:
    prepare(tmp_path)
    before = tree(tmp_path)
    changes = changes | ({"run": tmp_path / changes["run"]} if "run" in changes else {})
    with pytest.raises(InputError, match=message):
        quantize(asked(inputs, tmp_path, **changes), Silent())
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"recipe": "fp8"}, ["recipe"]),
        ({"unseen": "error", "dead": "error"}, ["policy.dead", "policy.unseen"]),
        ({"samples": 4}, ["run.tokens"]),
    ],
)
@pytest.mark.parametrize("unfinished", [False, True], ids=["whole", "unfinished"])
def test_another_export_is_refused_before(
    inputs: Path, two_commands: Path, tmp_path: Path, changes: dict[str, Any], fields: list[str],
    unfinished: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        if unfinished:
            after_a_shard(crash, patch)
        with pytest.raises(Crash) if unfinished else nullcontext():
            export(ExportSettings(run=two_commands / "out-run", out=tmp_path / "out", **SHARD))
    before = tree(tmp_path)
    with pytest.raises(IdentityMismatch, match="choose another OUT, or replace it with --overwrite") as found:
        quantize(asked(inputs, tmp_path, **changes), Silent())
    assert [difference.field for difference in found.value.differences] == fields
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("nothing_is_measured")
def test_an_out_that_another_process_makes_is_refused_before(inputs: Path, tmp_path: Path) -> None:
    with Disk().lock(tmp_path / ".out.lock"), pytest.raises(RunBusy, match="another process is exporting to"):
        quantize(asked(inputs, tmp_path), Silent())
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_another_export_is_replaced_if_asked(inputs: Path, two_commands: Path, tmp_path: Path) -> None:
    run = two_commands / "out-run"
    export(ExportSettings(run=run, out=tmp_path / "out", recipe="fp8"))
    quantize(asked(inputs, tmp_path, run=run, overwrite=True), Silent())
    assert tree(tmp_path / "out") == tree(two_commands / "out")


def test_a_dry_run_measures_and_writes_nothing(
    inputs: Path, two_commands: Path, tmp_path: Path, nothing_is_measured: None
) -> None:
    done = quantize(asked(inputs, tmp_path, run=two_commands / "out-run", dry_run=True), Silent())
    assert done.calibration is None and done.export.needs is not None
    with pytest.raises(HoldfastError, match="out-run is not a run"):
        quantize(asked(inputs, tmp_path, dry_run=True), Silent())
    assert list(tmp_path.iterdir()) == []
