"""`repair` makes heads again from whole files, and sets aside what stays unreadable."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from state.check import check_run
from state.durable import Disk
from state.errors import DamagedStore, InputError, RunBusy, Unreadable
from state.objects import solutions
from state.reader import open_run
from state.repair import RepairDisk, repair_run
from state.store import RunWriter
from tests.crash.faults import BadPath
from tests.crash.interposer import Interposer, Seen
from tests.state import driver
from tests.state.faults import CountingDisk, Crash, CrashingDisk, UnreadableDisk


def lose_head(run: Path) -> None:
    (run / "HEAD").unlink()


def lose_newest_heads(run: Path) -> None:
    (run / "HEAD").unlink()
    (run / "heads/000003.json").unlink()


def lose_all_heads(run: Path) -> None:
    (run / "HEAD").unlink()
    shutil.rmtree(run / "heads")


def damage_all_heads(run: Path) -> None:
    for path in (run / "HEAD", *(run / "heads").iterdir()):
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "lose", [lose_head, lose_newest_heads, lose_all_heads], ids=lambda lose: lose.__name__
)
def test_lost_heads_are_made_again_from_whole_files(finished: Path, lose: Callable[[Path], None]) -> None:
    whole = open_run(finished).head
    lose(finished)
    with repair_run(finished) as writer:
        assert writer.notes and writer.missing == ()
    assert check_run(finished, Disk()).whole
    head = open_run(finished).head
    assert (head.cursor, head.finished, head.generation) == (whole.cursor, True, "g000003")
    assert head.objects == whole.objects
    np.testing.assert_equal(dict(open_run(finished).generation().arrays), driver.statistics_after(3))


def test_a_repair_cut_short_anywhere_is_done_again(finished: Path, tmp_path: Path) -> None:
    whole = open_run(finished).head
    lose_all_heads(finished)
    steps = CountingDisk()
    repair_run(shutil.copytree(finished, tmp_path / "count"), steps).close()
    for at in range(len(steps.steps)):
        run = shutil.copytree(finished, tmp_path / str(at))
        with pytest.raises(Crash):
            repair_run(run, CrashingDisk(at))
        repair_run(run).close()
        assert open_run(run).head.objects == whole.objects, f"crash at step {at}"
        assert check_run(run, Disk()).whole


def test_an_older_commit_is_made_again_where_the_newest_is_not_whole(finished: Path) -> None:
    lose_all_heads(finished)
    bad = finished / "calibration.zarr/g000003/amax/lm_head.input/c.0"
    bad.write_bytes(b"x")
    with repair_run(finished) as writer:
        assert writer.notes[0] == "commit 3: its head is lost, and its files are not all whole"
        assert "heads/000002.json was made again" in writer.notes[1]
        assert (writer.head.generation, writer.head.finished) == ("g000002", False)
    assert [
        path.read_bytes() for path in (finished / "set-aside").rglob("g000003/amax/lm_head.input/c.0")
    ] == [b"x"]
    driver.drive(finished)
    np.testing.assert_equal(dict(open_run(finished).generation().arrays), driver.statistics_after(3))


def test_what_can_not_be_proved_is_not_believed(finished: Path) -> None:
    lose_all_heads(finished)
    (finished / "calibration.zarr/tokens/c.0.0").write_bytes(b"x")
    with pytest.raises(DamagedStore, match="Nothing was touched") as caught:
        repair_run(finished)
    assert caught.value.exit_code == 4
    (finished / "events.jsonl").unlink()
    with pytest.raises(DamagedStore, match="calibrate into a new run"):
        repair_run(finished)
    assert not (finished / "set-aside").exists()


def test_damaged_heads_are_no_reason_to_forget(finished: Path) -> None:
    damage_all_heads(finished)
    with pytest.raises(DamagedStore) as caught:
        RunWriter.resume(finished)
    assert caught.value.exit_code == 4
    before = sorted(
        path.read_bytes() for path in (finished / "calibration.zarr").rglob("*") if path.is_file()
    )
    with repair_run(finished) as writer:
        assert "was made again" in writer.notes[0]
    kept = [finished / "calibration.zarr", *(finished / "set-aside").rglob("calibration.zarr")]
    after = sorted(path.read_bytes() for place in kept for path in place.rglob("*") if path.is_file())
    assert after == before
    assert check_run(finished, Disk()).whole
    assert open_run(finished).head.finished


def test_damage_to_the_commit_before_is_set_aside(finished: Path) -> None:
    (finished / "calibration.zarr/g000002/amax/lm_head.input/c.0").write_bytes(b"x")
    with repair_run(finished) as writer:
        assert "the older commit 2: array g000002/amax/lm_head.input, c.0 is damaged" in writer.notes[0]
        assert (writer.head.generation, writer.head.finished) == ("g000003", True)
    assert check_run(finished, Disk()).whole
    assert len(list((finished / "set-aside").rglob("g000002/amax/lm_head.input/c.0"))) == 1


@pytest.mark.parametrize(
    "name",
    [
        "HEAD",
        "heads/000003.json",
        "heads/000002.json",
        "run.json",
        "heads/run.json",
        "events.jsonl",
        "zarr.json",
    ],
)
def test_any_file_may_stay_unreadable(finished: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("state.durable.PAUSES", ())
    monkeypatch.setattr("state.repair.LONG_PAUSES", ())
    if name == "zarr.json":
        with pytest.raises(DamagedStore, match="cannot be read"):
            repair_run(finished, Patient(errno.EIO, 10**6, name))
        return
    with repair_run(finished, Unlucky(finished / name)) as writer:
        assert (writer.head.generation, writer.head.finished) == ("g000003", True)
    assert check_run(finished, Disk()).whole or name == "events.jsonl"


class Unlucky(RepairDisk):
    """One file's bytes are lost, wherever it is moved; a new file in its place can be read."""

    def __init__(self, path: Path) -> None:
        self.lost = path.stat().st_ino

    def bytes(self, path: Path) -> bytes:
        if path.exists() and path.stat().st_ino == self.lost:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().bytes(path)


class Patient(RepairDisk, UnreadableDisk):
    """Repairs what an UnreadableDisk can't read."""


def test_what_stays_unreadable_is_set_aside(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.durable.PAUSES", (0,))
    monkeypatch.setattr("state.repair.LONG_PAUSES", (0, 0))
    name = "calibration.zarr/solutions/awq-test/2/scale/c.0"
    with repair_run(finished, Patient(errno.EIO, 5, name)) as writer:
        assert writer.notes == ()
    with repair_run(finished, Patient(errno.EIO, 10**6, name)) as writer:
        assert "cannot be read (Input/output error)" in writer.notes[0]
        assert "the solution of awq-test for layer 2 is lost, and nothing else" in writer.notes[0]
        assert solutions(writer.head.objects) == {}
    (aside,) = (finished / "set-aside").iterdir()
    assert (aside / name).exists()
    assert check_run(finished, Disk()).whole


def test_where_one_file_cannot_be_moved_the_others_stay_with_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("state.durable.PAUSES", ())
    monkeypatch.setattr("state.repair.LONG_PAUSES", ())
    whole = open_run(finished).head
    *_, last = sorted(path for path in whole.objects if "/g000003/" in path)
    bad = finished / last
    with (
        Interposer([finished], BadPath(Seen("stat", str(bad), ""))).watching(),
        pytest.raises(OSError) as caught,
    ):
        repair_run(finished)
    assert (caught.value.errno, str(caught.value.filename)) == (errno.EIO, str(bad))
    assert not (finished / "set-aside").exists()
    with repair_run(finished) as writer:
        assert writer.head.objects == whole.objects


def test_an_error_of_the_moment_is_no_damage_for_repair_either(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("state.durable.PAUSES", ())
    monkeypatch.setattr("state.repair.LONG_PAUSES", ())
    with pytest.raises(Unreadable, match="Too many open files"):
        repair_run(finished, Patient(errno.EMFILE, 10**6, "c.0"))
    assert not (finished / "set-aside").exists()


def test_a_run_that_is_written_or_none_is_left_alone(finished: Path, tmp_path: Path) -> None:
    with RunWriter.resume(finished), pytest.raises(RunBusy):
        repair_run(finished)
    with pytest.raises(InputError, match="not a run"):
        repair_run(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/run.json").write_text("mine")
    with pytest.raises(InputError, match="not a run"):
        repair_run(tmp_path / "folder")
