"""A folder that is moved, deleted or replaced while it is written."""

import shutil
from pathlib import Path

import pytest

from state.errors import InputError
from state.place import PlacedDisk


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def disk(run: Path) -> PlacedDisk:
    disk = PlacedDisk()
    disk.stay_at(run)
    return disk


def test_a_folder_at_its_place_is_written(disk: PlacedDisk, run: Path) -> None:
    disk.put(run / "a", b"a")
    assert (run / "a").read_bytes() == b"a"


def test_a_folder_reached_by_another_name_is_the_same(disk: PlacedDisk, run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "elsewhere")
    run.symlink_to(tmp_path / "elsewhere")
    disk.put(run / "a", b"a")
    assert (tmp_path / "elsewhere/a").read_bytes() == b"a"


@pytest.mark.parametrize("again", [False, True], ids=["gone", "another"])
def test_a_moved_folder_is_named_and_nothing_is_written(
    disk: PlacedDisk, run: Path, tmp_path: Path, again: bool
) -> None:
    run.rename(tmp_path / "new")
    if again:
        run.mkdir()
    for change in (
        lambda: disk.put(run / "a" / "b", b"a"),
        lambda: disk.publish(run / "a", b"a"),
        lambda: disk.append(run / "a", b"a"),
        lambda: disk.sync([run]),
    ):
        with pytest.raises(InputError, match=f"{run} was moved to {tmp_path / 'new'} while"):
            change()
    assert run.exists() is again
    assert not again or list(run.iterdir()) == []


def test_a_deleted_folder_is_said_to_be_deleted(disk: PlacedDisk, run: Path) -> None:
    shutil.rmtree(run)
    with pytest.raises(InputError, match=f"{run} was deleted while"):
        disk.put(run / "a", b"a")
    assert not run.exists()


def test_who_has_left_may_write_anywhere(disk: PlacedDisk, run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "new")
    disk.leave()
    disk.put(tmp_path / "new/a", b"a")
    disk.leave()
