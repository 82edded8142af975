"""The record of what a commit is about to write, and the removal of what it and dropped heads name."""

from pathlib import Path

import numpy as np
import pytest

from state.claim import create_run
from state.durable import Disk
from state.errors import InputError
from state.head import Cursor
from state.remove import remove_files
from state.store import RunWriter
from state.update import Solution, Update
from state.writing import Writing, all_writing, read_writing
from tests.state import driver
from tests.state.faults import CountingDisk

RECORD = Writing(7, ("HEAD.tmp", "calibration.zarr/g000007/amax/x/c.0"))


def put(run: Path, name: str, data: bytes) -> None:
    (run / "heads").mkdir(parents=True, exist_ok=True)
    (run / "heads" / name).write_bytes(data)


def test_round_trip(tmp_path: Path) -> None:
    put(tmp_path, "000007.writing", RECORD.encode())
    assert read_writing(tmp_path, "000007.writing", Disk()) == RECORD
    assert all_writing(tmp_path, ["000007.json", "000007.writing", "notes"], Disk()) == [RECORD]


def test_one_cut_short_names_nothing_and_one_changed_is_nobody_s(tmp_path: Path) -> None:
    data = RECORD.encode()
    for length in range(len(data)):
        put(tmp_path, "000007.writing", data[:length])
        assert read_writing(tmp_path, "000007.writing", Disk()) == Writing(7, ()), length
    for position in range(len(data)):
        put(tmp_path, "000007.writing", data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        found = read_writing(tmp_path, "000007.writing", Disk())
        assert found is None or found.files == (), position
    put(tmp_path, "000008.writing", data)
    assert read_writing(tmp_path, "000008.writing", Disk()) is None


@pytest.mark.parametrize(
    "path", ["../x", "/x", "NOTES.md", "HEAD", "heads/notes.txt", "activations/000001.raw", ""]
)
def test_one_with_other_names_is_nobody_s(tmp_path: Path, path: str) -> None:
    put(tmp_path, "000007.writing", Writing(7, (path,)).encode())
    assert read_writing(tmp_path, "000007.writing", Disk()) is None


def test_a_commit_writes_exactly_what_it_has_named(tmp_path: Path, unsynced: None) -> None:
    disk = CountingDisk()
    run = tmp_path / "run"

    def check(named: Writing) -> None:
        put_ = {path.relative_to(run).as_posix() for step, path in disk.steps if step in ("put", "publish")}
        assert put_ - {named.path} == set(named.files)

    seen: list[Writing] = []

    class Watching(CountingDisk):
        def remove(self, path: Path) -> None:
            if path.suffix == ".writing":
                seen.extend(all_writing(run, [path.name], self))
            super().remove(path)

    disk = Watching()
    writer = create_run(run, driver.RECORD, driver.TOKENS, disk)
    check(seen[-1])
    odd = Solution("s", 0, {"scalar": np.array(1.0), "two": np.ones((4, 5))})
    for batch in range(3):
        disk.steps.clear()
        writer.commit(Update(Cursor(batch=batch), False, driver.observed(batch), driver.solutions(batch)))
        check(seen[-1])
    disk.steps.clear()
    writer.commit(Update(Cursor(batch=3), True, solutions=(odd,)))
    check(seen[-1])
    writer.close()


def test_a_commit_syncs_the_record_and_what_it_dropped_beyond_its_files(halfway: Path) -> None:
    disk = CountingDisk()
    with RunWriter.resume(halfway, disk) as writer:
        disk.steps.clear()
        writer.commit(Update(Cursor(batch=3), True, driver.observed(0)))
    synced = [path.relative_to(halfway).as_posix() for step, path in disk.steps if step in ("fsync", "sync")]
    of_objects = {path for path in synced if path.startswith("calibration.zarr/")}
    assert [path for path in synced if path not in of_objects] == [
        "heads/000003.writing", "heads",
        "calibration.zarr", ".",
        "heads/000003.json", "heads", ".", "HEAD.tmp", ".",
        "calibration.zarr",
    ]  # fmt: skip


def test_files_go_by_name_and_folders_only_once_empty(tmp_path: Path) -> None:
    for name in ("a/b/ours", "a/b/mine", "a/c/ours"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    remove_files(tmp_path, ["a/b/ours", "a/c/ours", "a/c/gone", "d/gone"], Disk())
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a",
        "a/b",
        "a/b/mine",
    ]


def test_nothing_is_removed_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/c.0").write_bytes(b"mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="symbolic link"):
        remove_files(tmp_path / "run", ["a/c.0"], Disk())
    assert (tmp_path / "victim/c.0").exists()
