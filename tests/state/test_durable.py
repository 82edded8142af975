import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from state.durable import Disk
from state.errors import InputError, OutOfSpace, RunBusy
from tests.state.faults import CountingDisk, Crash, CrashingDisk, FailingDisk


def test_put_makes_parents_and_never_overwrites(tmp_path: Path) -> None:
    disk = Disk()
    disk.put(tmp_path / "a/b/c", b"first")
    with pytest.raises(FileExistsError):
        disk.put(tmp_path / "a/b/c", b"second")
    assert disk.read(tmp_path / "a/b/c") == b"first"


def test_put_takes_views_of_any_item_size(tmp_path: Path) -> None:
    Disk().put(tmp_path / "a", memoryview(b"12345678").cast("I"))
    assert (tmp_path / "a").read_bytes() == b"12345678"


def test_publish_shows_the_old_bytes_until_the_last_step(tmp_path: Path) -> None:
    Disk().publish(tmp_path / "HEAD", b"old")
    disk = CountingDisk()
    disk.publish(tmp_path / "HEAD", b"new")
    assert [step for step, _ in disk.steps] == ["publish", "fsync", "replace", "sync"]
    for at, expected in enumerate([b"old", b"old", b"old", b"new"]):
        Disk().publish(tmp_path / "HEAD", b"old")
        with pytest.raises(Crash):
            CrashingDisk(at).publish(tmp_path / "HEAD", b"new")
        assert (tmp_path / "HEAD").read_bytes() == expected


def test_rename_moves_a_folder_and_syncs_both_parents(tmp_path: Path) -> None:
    disk = CountingDisk()
    disk.put(tmp_path / "a/out.partial/x", b"1")
    (tmp_path / "b").mkdir()
    disk.steps.clear()
    disk.rename(tmp_path / "a/out.partial", tmp_path / "b/out")
    assert disk.steps == [
        ("rename", tmp_path / "b/out"),
        ("sync", tmp_path / "b"),
        ("sync", tmp_path / "a"),
    ]
    assert (tmp_path / "b/out/x").read_bytes() == b"1"


def test_append_list_and_delete(tmp_path: Path) -> None:
    disk = Disk()
    disk.append(tmp_path / "log", b"1\n")
    disk.append(tmp_path / "log", b"2\n")
    disk.put(tmp_path / "folder/b", b"")
    disk.put(tmp_path / "folder/a", b"")
    assert disk.read(tmp_path / "log") == b"1\n2\n"
    assert disk.list(tmp_path / "folder") == ["a", "b"]
    disk.delete(tmp_path / "folder")
    disk.delete(tmp_path / "folder")
    assert disk.list(tmp_path / "folder") == []
    assert disk.list(tmp_path / "log/below") == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_errors_of_the_device_name_path_and_bytes(tmp_path: Path, error: int) -> None:
    with pytest.raises(OutOfSpace, match="5 bytes are needed") as caught:
        FailingDisk(0, error).put(tmp_path / "a", b"12345")
    assert (caught.value.path, caught.value.needed) == (tmp_path / "a", 5)
    assert str(tmp_path / "a") in str(caught.value)


def test_errors_of_access_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Choose another place") as caught:
        FailingDisk(0, errno.EACCES).put(tmp_path / "a", b"")
    assert str(tmp_path / "a") in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        Disk().put(tmp_path / "file/below", b"")


def test_free_bytes_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert Disk().free_bytes(tmp_path / "a/b") > 0


def test_lock_is_exclusive_and_says_who_holds_it(tmp_path: Path) -> None:
    disk = Disk()
    with disk.lock(tmp_path / "run/.lock"):
        with pytest.raises(RunBusy) as caught, disk.lock(tmp_path / "run/.lock"):
            pass
        assert f"{tmp_path / 'run'} is being written by process {os.getpid()}" in str(caught.value)
        assert "holdfast status" in str(caught.value)
    with disk.lock(tmp_path / "run/.lock"):
        pass


HOLDER = """
import sys, os
from pathlib import Path
from state.durable import Disk
reading, writing = os.pipe()
with Disk().lock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data loader's worker would: it outlives the holder
        os.write(writing, b".")
        sys.stdin.read()
        os._exit(0)
    os.read(reading, 1)  # until the child has begun, and let go of what it inherited
    print("held", flush=True)
    sys.stdin.read()
"""


def test_killing_the_holder_frees_the_lock(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=f"process {holder.pid}"), Disk().lock(tmp_path / ".lock"):
            pass
        holder.kill()
        holder.wait()
        with Disk().lock(tmp_path / ".lock"):
            pass
