"""Killed at every single operation, the same command again ends with the same statistics."""

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from state.check import check_run
from state.durable import Disk
from state.errors import OutOfSpace, WriteFailed
from state.reader import open_run
from tests.state import driver
from tests.state.faults import CountingDisk, Crash, CrashingDisk, FailingDisk, ForgetfulDisk, TearingDisk

OUTSIDE = ("HEAD", "heads", "events.jsonl", ".lock", "set-aside")
"""What promise 1 leaves out."""


def tree(run: Path) -> dict[str, bytes]:
    """Every file that promise 1 covers, by path, without the generation's number; the two newest
    generations.
    """
    head = open_run(run).head
    files = {}
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_file() and name.split("/")[0] not in OUTSIDE:
            group = name.split("/")[1] if name.startswith("calibration.zarr/g0") else ""
            role = "newest" if group == head.generation else "older"
            files[name.replace(group, role) if group else name] = path.read_bytes()
    return files


def nothing_left_over(run: Path) -> bool:
    """Whether every file is whole and named by a commit: nothing of what was cut short stays behind."""
    checked = check_run(run, Disk())
    records = [path for path in (run / "heads").iterdir() if path.suffix in (".writing", ".dropped")]
    return checked.whole and not checked.foreign and not records


def steps_of(run: Path, until: int) -> int:
    disk = CountingDisk()
    driver.drive(run, disk, until)
    return len(disk.steps)


@pytest.fixture
def undisturbed(tmp_path: Path, unsynced: None) -> dict[str, bytes]:
    driver.drive(tmp_path / "undisturbed")
    return tree(tmp_path / "undisturbed")


@pytest.fixture
def two_commits(tmp_path: Path, unsynced: None) -> Path:
    driver.drive(tmp_path / "two", until=2)
    return tmp_path / "two"


@pytest.mark.parametrize("kind", [CrashingDisk, TearingDisk])
def test_crash_at_every_step_of_create_and_the_first_commit(
    tmp_path: Path, undisturbed: dict[str, bytes], kind: type[CrashingDisk]
) -> None:
    steps = steps_of(tmp_path / "count", until=1)
    assert steps > 60
    for at in range(steps):
        run = tmp_path / f"at{at}"
        with pytest.raises(Crash):
            driver.drive(run, kind(at), until=1)
        driver.drive(run)
        assert tree(run) == undisturbed, f"crash at step {at}"
        assert nothing_left_over(run), f"crash at step {at}"


def test_crash_at_every_step_of_a_resumed_commit_that_collects_the_first(
    tmp_path: Path, undisturbed: dict[str, bytes], two_commits: Path
) -> None:
    steps = steps_of(shutil.copytree(two_commits, tmp_path / "count"), until=3)
    for at in range(steps):
        run = shutil.copytree(two_commits, tmp_path / f"at{at}")
        with pytest.raises(Crash):
            driver.drive(run, CrashingDisk(at))
        assert open_run(run).notes == ()
        driver.drive(run)
        assert tree(run) == undisturbed, f"crash at step {at}"
        assert nothing_left_over(run), f"crash at step {at}"


@pytest.mark.parametrize(
    "damaged",
    ["calibration.zarr/g000002/amax/lm_head.input/c.0", "calibration.zarr/zarr.json", "heads/000002.json"],
)
def test_crash_at_every_step_of_recovery(
    tmp_path: Path, undisturbed: dict[str, bytes], two_commits: Path, damaged: str
) -> None:
    (two_commits / damaged).write_bytes(b"damaged")
    steps = steps_of(shutil.copytree(two_commits, tmp_path / "count"), until=1)
    assert steps > 10
    for at in range(steps):
        run = shutil.copytree(two_commits, tmp_path / f"at{at}")
        with pytest.raises(Crash):
            driver.drive(run, CrashingDisk(at), until=1)
        driver.drive(run)
        assert tree(run) == undisturbed, f"crash at step {at} of recovery"
        assert nothing_left_over(run), f"crash at step {at} of recovery"
        assert b"damaged" in [path.read_bytes() for path in (run / "set-aside").rglob("*") if path.is_file()]


def test_a_second_crash_during_the_rerun(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    for first in range(10, 130, 29):
        for second in range(3, 60, 17):
            run = tmp_path / f"at{first}-{second}"
            for at in (first, second):
                with pytest.raises(Crash):
                    driver.drive(run, CrashingDisk(at))
            driver.drive(run)
            assert tree(run) == undisturbed, f"crashes at steps {first} and {second}"


@pytest.mark.parametrize("seed", [None, 1])
def test_power_cut_at_every_step_loses_nothing_published(
    tmp_path: Path, undisturbed: dict[str, bytes], seed: int | None
) -> None:
    steps = steps_of(tmp_path / "count", until=3)
    for at in range(seed or 0, steps, 3):
        world = tmp_path / f"before{at}"
        world.mkdir()
        disk = ForgetfulDisk(world, at)
        with pytest.raises(Crash):
            driver.drive(world / "runs/run", disk)
        # Creation and every commit end with a line in the event log.
        ended = [step for step, _ in disk.steps[:at]].count("append")

        run = tmp_path / f"after{at}/runs/run"
        disk.after_power_cut(tmp_path / f"after{at}", seed)
        if ended:
            reader = open_run(run)
            assert reader.head.number >= ended - 1, f"power cut at step {at}"
            assert reader.notes == ()
        driver.drive(run)
        assert tree(run) == undisturbed, f"power cut at step {at}"
        assert nothing_left_over(run), f"power cut at step {at}"


def test_what_a_rerun_found_finished_stays_so_after_a_power_cut(tmp_path: Path, unsynced: None) -> None:
    steps = CountingDisk()
    driver.drive(tmp_path / "count/run", steps)
    publication = [at for at, (operation, _) in enumerate(steps.steps) if operation == "replace"][-1]

    disk = ForgetfulDisk(tmp_path / "before", publication + 1)
    with pytest.raises(Crash):
        driver.drive(tmp_path / "before/run", disk)
    assert open_run(tmp_path / "before/run").head.number == 3
    disk.after_power_cut(tmp_path / "at once", None)
    assert open_run(tmp_path / "at once/run").head.number == 2

    disk.at = len(steps.steps) * 2
    driver.drive(tmp_path / "before/run", disk)
    assert open_run(tmp_path / "before/run").head.finished
    disk.after_power_cut(tmp_path / "later", None)
    assert open_run(tmp_path / "later/run").head.finished


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_device_at_every_step(
    tmp_path: Path, undisturbed: dict[str, bytes], two_commits: Path, error: int
) -> None:
    steps = steps_of(shutil.copytree(two_commits, tmp_path / "count"), until=3)
    needed = sum(values.nbytes + 1024 for values in driver.statistics_after(3).values())
    seen = set()
    for at in range(0, steps, 1 if error == errno.ENOSPC else 5):
        run = shutil.copytree(two_commits, tmp_path / f"at{at}")
        disk = FailingDisk(at, error)
        with pytest.raises(OutOfSpace if error == errno.ENOSPC else WriteFailed) as caught:
            driver.drive(run, disk)
        operation, path = disk.steps[at]
        seen.add(operation)
        assert caught.value.exit_code == 2
        assert str(path) in str(caught.value) or path.name == "HEAD.tmp"
        assert ("make room" in str(caught.value)) == (error == errno.ENOSPC)
        if error == errno.ENOSPC and operation == "put" and "g000003" in str(path):
            assert f"{needed:,} bytes are needed" in str(caught.value)
            np.testing.assert_equal(dict(open_run(run).generation().arrays), driver.statistics_after(2))
        driver.drive(run)
        assert tree(run) == undisturbed, f"{errno.errorcode[error]} at step {at}"
    assert seen >= {"put", "fsync", "sync"}


def test_a_real_sigkill_at_some_steps(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    steps = steps_of(tmp_path / "count", until=3)
    for at in range(5, steps, steps // 5):
        run = tmp_path / f"at{at}"
        command = [sys.executable, "-m", "tests.state.driver", str(run)]
        killed = subprocess.run([*command, "--kill-at", str(at)], cwd=Path(__file__).parents[2])
        assert killed.returncode == -signal.SIGKILL
        driver.drive(run)
        assert tree(run) == undisturbed, f"SIGKILL at step {at}"


def test_published_bytes_are_never_overwritten(tmp_path: Path, unsynced: None) -> None:
    class Watching(Disk):
        """Remembers what every file held when it was first published."""

        def __init__(self) -> None:
            self.seen: dict[Path, bytes] = {}

        def before(self, operation: str, path: Path) -> None:
            for known, data in self.seen.items():
                assert not known.exists() or known.read_bytes() == data, f"{known} changed before {operation}"
            if operation == "replace":
                self.seen |= {file: file.read_bytes() for file in path.parent.rglob("*") if immutable(file)}

    def immutable(file: Path) -> bool:
        return file.is_file() and file.name not in ("HEAD", "HEAD.tmp", "events.jsonl", ".lock")

    disk = Watching()
    driver.drive(tmp_path / "run", disk)
    assert len(disk.seen) > 30
