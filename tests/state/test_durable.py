import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from state.durable import Disk
from state.errors import InputError, OutOfSpace, RunBusy, Unreadable, WriteFailed
from tests.state.faults import CountingDisk, Crash, CrashingDisk, FailingDisk, UnreadableDisk


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


def test_append_list_and_remove(tmp_path: Path) -> None:
    disk = Disk()
    disk.append(tmp_path / "log", b"1\n")
    disk.append(tmp_path / "log", b"2\n")
    disk.put(tmp_path / "folder/b", b"")
    disk.put(tmp_path / "folder/a", b"")
    assert disk.read(tmp_path / "log") == b"1\n2\n"
    assert disk.list(tmp_path / "folder") == ["a", "b"]
    disk.remove(tmp_path / "folder/a")
    disk.remove(tmp_path / "folder/a")
    assert disk.list(tmp_path / "folder") == ["b"]
    assert disk.list(tmp_path / "log/below") == []


def test_folders_are_made_one_by_one(tmp_path: Path) -> None:
    disk = CountingDisk()
    disk.make_folder(tmp_path / "a")
    disk.make_folder(tmp_path / "a")
    assert disk.list(tmp_path) == ["a"]
    assert {step for step, _ in disk.steps} == {"mkdir"}


@pytest.mark.parametrize("content", [b"a poem", b"12 monkeys", b"\n\n", None])
def test_a_file_that_is_no_lock_is_not_taken_for_one(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        (tmp_path / ".lock").mkdir()
    else:
        (tmp_path / ".lock").write_bytes(content)
    with (
        pytest.raises(InputError, match=r"\.lock is in the way: it is no lock"),
        Disk().lock(tmp_path / ".lock"),
    ):
        pass
    assert content is None or (tmp_path / ".lock").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"4711\n", b"47"])
def test_a_lock_of_ours_is_taken_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with Disk().lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_errors_of_the_device_name_path_and_bytes(tmp_path: Path, error: int) -> None:
    with pytest.raises(OutOfSpace, match="5 bytes are needed") as caught:
        FailingDisk(0, error).put(tmp_path / "a", b"12345")
    assert (caught.value.path, caught.value.needed) == (tmp_path / "a", 5)
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EIO, "Input/output error"),
        (errno.ESTALE, "Stale file handle"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_errors_that_room_would_not_mend_say_what_they_are(tmp_path: Path, error: int, words: str) -> None:
    with pytest.raises(WriteFailed) as caught:
        FailingDisk(0, error).put(tmp_path / "a", b"12345")
    assert f"{tmp_path / 'a'} could not be written: {words}" in str(caught.value)
    assert "make room" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "read", [lambda disk, path: disk.read(path), lambda disk, path: disk.list(path.parent)]
)
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_can_not_be_read_is_read_again_before_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, read: Callable[[Disk, Path], object]
) -> None:
    monkeypatch.setattr("state.durable.PAUSES", (0, 0, 0))
    (tmp_path / "a").write_bytes(b"12345")
    assert read(UnreadableDisk(error, times=3), tmp_path / "a") in (b"12345", ["a"])
    with pytest.raises(Unreadable, match=f"{tmp_path}.* can't be read now: {os.strerror(error)}") as caught:
        read(UnreadableDisk(error, times=4), tmp_path / "a")
    assert (caught.value.exit_code, "try again" in str(caught.value)) == (2, True)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    for name in ("events.jsonl", "HEAD.tmp", ".lock", "object"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    disk = Disk()
    with pytest.raises(InputError, match="symbolic link"):
        disk.append(tmp_path / "events.jsonl", b"line\n")
    with pytest.raises(InputError, match="symbolic link"):
        disk.publish(tmp_path / "HEAD", b"new")
    with pytest.raises(InputError, match="is no lock"), disk.lock(tmp_path / ".lock"):
        pass
    with pytest.raises(FileExistsError):
        disk.put(tmp_path / "object", b"new")
    disk.remove(tmp_path / "object")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_folders_go_only_when_empty_and_files_never_over_others(tmp_path: Path) -> None:
    disk = Disk()
    disk.put(tmp_path / "folder/mine", b"1")
    assert not disk.remove_empty(tmp_path / "folder")
    disk.move(tmp_path / "folder/mine", tmp_path / "other/place/mine")
    assert disk.remove_empty(tmp_path / "folder") and disk.remove_empty(tmp_path / "folder")
    disk.put(tmp_path / "second", b"2")
    with pytest.raises(FileExistsError):
        disk.move(tmp_path / "second", tmp_path / "other/place/mine")
    assert disk.read(tmp_path / "other/place/mine") == b"1"


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


def test_the_folder_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path} may not be written: Read-only file system"):
        FailingDisk(0, errno.EROFS).sync([Path()])
