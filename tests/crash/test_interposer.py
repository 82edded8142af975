"""What the laboratory sees of Python's file operations, and what its faults and power cuts leave."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.faults import BadPath, Fault, Striking
from tests.crash.interposer import Interposer, Seen
from tests.crash.powercut import Durable
from tests.crash.server import call
from tests.crash.strata import Census, kind_of_file


class Noting:
    """Keeps every operation as text."""

    def __init__(self, root: Path) -> None:
        self.seen: list[str] = []
        self._root = root

    def before(self, seen: Seen, half: Callable[[], object] | None) -> None:
        self.seen.append(f"{seen.operation} {Path(seen.path).relative_to(self._root)}")

    def after(self, seen: Seen) -> None:
        pass


def test_operations_of_pathlib_os_and_shutil_are_seen(tmp_path: Path) -> None:
    noting = Noting(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    with Interposer([tmp_path], noting).watching():
        (tmp_path / "new").mkdir()
        (tmp_path / "new/text").write_text("hello")
        descriptor = os.open(tmp_path / "new/raw", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"hello")
        os.fsync(descriptor)
        os.close(descriptor)
        (tmp_path / "new/raw").rename(tmp_path / "new/renamed")
        assert (tmp_path / "new/text").read_bytes() == b"hello"
        shutil.rmtree(tmp_path / "old")
    changes = [one for one in noting.seen if not one.startswith(("open", "read", "list", "stat"))]
    assert changes == [
        "mkdir new", "create new/text", "write new/text", "create new/raw", "write new/raw", "sync new/raw",
        "rename new/renamed", "unlink old/file", "rmdir old",
    ]  # fmt: skip
    assert {"open new/text", "read new/text"} <= set(noting.seen)
    seen = len(noting.seen)
    (tmp_path / "later").touch()
    assert len(noting.seen) == seen


def test_elsewhere_nothing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noting = Noting(tmp_path / "in")
    with Interposer([tmp_path / "in"], noting).watching():
        (tmp_path / "out").write_text("x")
    assert noting.seen == []


def write(path: Path, number: int) -> int:
    """Write four bytes at once, `number` times."""
    for _ in range(number):
        path.write_bytes(b"1234")
    return 0


@pytest.mark.parametrize(("kind", "left"), [("kill before", b""), ("kill after", b"1234"), ("tear", b"12")])
def test_a_fault_strikes_at_the_chosen_operation(tmp_path: Path, kind: str, left: bytes) -> None:
    world = tmp_path / "world"
    world.mkdir()
    census = Census(world)
    with Interposer([world], census).watching():
        write(world / "file", 2)
    stratum = next(name for name in census.counts if name.startswith("write"))
    assert census.counts[stratum] == 2
    (world / "file").unlink()

    def work() -> int:
        with Interposer([world], Striking(Fault(kind, stratum, 1), world, tmp_path / "mark")).watching():
            return write(world / "file", 3)

    assert call(work, tmp_path / "log").code == -signal.SIGKILL
    assert (world / "file").read_bytes() == left
    assert (tmp_path / "mark").read_text() == f"write {world}/file"


def test_a_bad_path_fails_and_others_do_not(tmp_path: Path) -> None:
    (tmp_path / "bad").touch()
    with Interposer([tmp_path], BadPath(Seen("read", str(tmp_path / "bad"), ""))).watching():
        (tmp_path / "good").write_text("x")
        with pytest.raises(OSError) as caught:
            (tmp_path / "bad").read_text()
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(("seed", "left"), [(None, {"kept": b"new"}), (3, {"kept": b"new", "young": b""})])
def test_a_power_cut_forgets_what_was_not_synced(
    tmp_path: Path, seed: int | None, left: dict[str, bytes]
) -> None:
    world, after = tmp_path / "world", tmp_path / "after"
    world.mkdir()
    (world / "kept").write_bytes(b"old")
    durable = Durable(world)

    class Following:
        def before(self, seen: Seen, half: object) -> None: ...

        def after(self, seen: Seen) -> None:
            durable.done(seen)

    with Interposer([world], Following()).watching():
        with (world / "kept").open("wb") as file:
            file.write(b"new")
            file.flush()
            os.fsync(file.fileno())
        (world / "young").write_bytes(b"young")
    durable.leave(after, seed)
    assert {path.name: path.read_bytes() for path in after.iterdir()} == left


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("run/heads/000012.json", "run/heads/N.json"),
        ("run/calibration.zarr/g000003/amax/a.L.b.input/c.1.0", "run/calibration.zarr/gN/STATISTIC/chunk"),
        (
            "run/calibration.zarr/solutions/x/2/s/zarr.json",
            "run/calibration.zarr/solutions/SOLVER/N/zarr.json",
        ),
        ("out/model-00001-of-00002.safetensors", "out/model-N-of-N.safetensors"),
    ],
)
def test_kinds_leave_out_numbers_and_names_of_arrays(path: str, kind: str, tmp_path: Path) -> None:
    assert kind_of_file(str(tmp_path / path), tmp_path) == kind
