"""`check` reads everything, names what is damaged, and changes nothing."""

import errno
from pathlib import Path

import pytest

from state.check import check_run
from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.store import RunWriter
from state.update import Update
from tests.state import driver
from tests.state.faults import UnreadableDisk
from tests.state.test_damage import files_of


def test_a_whole_run(finished: Path) -> None:
    checked = check_run(finished, Disk())
    assert checked.whole and checked.costs == () and checked.foreign == ()
    assert checked.newest is not None and checked.newest.number == 3
    assert checked.files == len(files_of(finished))


def test_every_flipped_bit_of_every_file_is_named(finished: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in files_of(finished)}
    for name, data in before.items():
        (finished / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert list(check_run(finished, Disk()).damaged) == [name]
        (finished / name).unlink()
        gone = check_run(finished, Disk())
        assert list(gone.damaged) == [name] or (name, gone.damaged) == ("heads/000002.json", {})
        (finished / name).write_bytes(data)
    assert check_run(finished, Disk()).whole


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("calibration.zarr/g000003/amax/lm_head.input/c.0", "statistics of commit 3 are lost"),
        ("calibration.zarr/solutions/awq-test/2/scale/c.0", "the solution of awq-test for layer 2 is lost"),
        ("calibration.zarr/tokens/c.0.0", "export needs no tokens"),
    ],
)
def test_it_says_what_damage_costs(finished: Path, name: str, cost: str) -> None:
    (finished / name).write_bytes(b"x")
    assert [cost in said for said in check_run(finished, Disk()).costs] == [True]


def test_what_can_not_be_read_now_is_no_damage(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.durable.PAUSES", ())
    checked = check_run(finished, UnreadableDisk(errno.EIO, 1, "tokens/c.0.0"))
    assert (checked.whole, dict(checked.damaged)) == (False, {})
    assert checked.unreadable == {
        "calibration.zarr/tokens/c.0.0": "calibration.zarr/tokens/c.0.0 can't be read now: Input/output error"
    }


def test_files_of_others_are_named(finished: Path) -> None:
    (finished / "heads/notes.txt").write_text("mine")
    checked = check_run(finished, Disk())
    assert (checked.whole, checked.foreign) == (True, ("heads/notes.txt",))


def test_while_a_writer_commits(halfway: Path) -> None:
    class Racing(Disk):
        left = 3

        def bytes(self, path: Path) -> bytes:
            if "g00000" in str(path) and self.left:
                self.left -= 1
                writer.commit(Update(writer.head.cursor, False, driver.observed(0)))
            return super().bytes(path)

    with RunWriter.resume(halfway) as writer:
        checked = check_run(halfway, Racing())
    assert checked.whole and checked.newest is not None and checked.newest.number == 5


def test_what_is_no_run_or_has_lost_its_heads(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        check_run(tmp_path / "nowhere", Disk())
    for path in (finished / "HEAD", *(finished / "heads").iterdir()):
        path.unlink()
    with pytest.raises(DamagedStore, match="all heads are lost"):
        check_run(finished, Disk())
