"""The lock of a run that does not exist yet."""

import errno
import shutil
from pathlib import Path

import pytest

from state.claim import Claim, create_run
from state.durable import Disk
from state.errors import DamagedStore, InputError, OutOfSpace, RunBusy
from state.reader import open_run
from state.recovery import published
from state.store import RunWriter
from tests.state import driver
from tests.state.faults import CountingDisk, Crash, CrashingDisk, FailingDisk


def test_a_claim_keeps_others_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Claim(run), pytest.raises(RunBusy, match="being written"):
        Claim(run).__enter__()


def test_a_claim_given_up_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), Claim(run):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with Claim(run):
        assert run.is_dir()


def test_the_lock_of_a_folder_put_in_its_place_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Claim(run):
        run.rename(tmp_path / "elsewhere")
        run.mkdir()
        (run / ".lock").touch()
    assert (run / ".lock").exists()


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Claim(tmp_path):
        _ = 1 / 0
    assert tmp_path.is_dir()


def test_the_lock_goes_on_to_the_writer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Claim(run) as claim:
        writer = claim.create(driver.RECORD, driver.TOKENS)
    with writer, pytest.raises(RunBusy):
        RunWriter.resume(run)
    RunWriter.resume(run).close()


def test_a_creation_that_fails_at_its_last_step_frees_the_lock(tmp_path: Path, unsynced: None) -> None:
    steps = CountingDisk()
    create_run(tmp_path / "count", driver.RECORD, driver.TOKENS, steps).close()
    run = tmp_path / "run"
    with pytest.raises(OutOfSpace):
        create_run(run, driver.RECORD, driver.TOKENS, FailingDisk(len(steps.steps) - 1, errno.ENOSPC))
    RunWriter.resume(run).close()


def test_a_run_that_exists_can_not_be_claimed(tmp_path: Path) -> None:
    create_run(tmp_path / "run", driver.RECORD, driver.TOKENS).close()
    with pytest.raises(InputError, match="exists already"):
        Claim(tmp_path / "run").__enter__()
    assert published(tmp_path / "run", Disk())


def test_create_refuses_what_is_there(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        create_run(finished, driver.RECORD, driver.TOKENS)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\)"):
        create_run(tmp_path / "home", driver.RECORD, driver.TOKENS)
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        create_run(tmp_path / "home/thesis.tex", driver.RECORD, driver.TOKENS)
    with pytest.raises(ValueError, match="tokens must be"):
        create_run(tmp_path / "other", driver.RECORD, driver.TOKENS + 1)


def test_files_of_someone_else_are_not_taken_for_a_creation_cut_short(tmp_path: Path, unsynced: None) -> None:
    for number, name in enumerate(
        [
            "activations/before-000001.json",
            "run.json",
            "calibration.zarr/zarr.json",
            "heads/run.json",
            "HEAD.tmp",
        ]
    ):
        run = tmp_path / str(number)
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds other files .*{name.split('/')[0]}"):
            create_run(run, driver.RECORD, driver.TOKENS)
        assert (run / name).read_text() == "mine"
        assert [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()] == [name]


def test_beside_what_a_creation_left_other_files_are_refused_and_stay(tmp_path: Path, unsynced: None) -> None:
    run = tmp_path / "run"
    steps = CountingDisk()
    create_run(tmp_path / "count", driver.RECORD, driver.TOKENS, steps).close()
    tokens = [path.name for _, path in steps.steps].index("c.0.0")
    with pytest.raises(Crash):
        create_run(run, driver.RECORD, driver.TOKENS, CrashingDisk(tokens))
    assert (run / "run.json").exists() and not published(run, Disk())
    (run / "calibration.zarr/mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(calibration\.zarr/mine\.txt\)"):
        create_run(run, driver.RECORD, driver.TOKENS)
    assert (run / "run.json").exists()
    (run / "calibration.zarr/mine.txt").unlink()
    create_run(run, driver.RECORD, driver.TOKENS).close()


def test_an_empty_folder_is_nobody_s(tmp_path: Path, unsynced: None) -> None:
    (tmp_path / "run").mkdir()
    create_run(tmp_path / "run", driver.RECORD, driver.TOKENS).close()


def test_a_run_whose_heads_are_lost_is_never_begun_anew(finished: Path) -> None:
    shutil.rmtree(finished / "heads")
    (finished / "HEAD").unlink()
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for attempt in (lambda: Claim(finished).__enter__(), lambda: open_run(finished)):
        with pytest.raises(DamagedStore, match=f"holdfast repair {finished}") as caught:
            attempt()
        assert caught.value.exit_code == 4
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
