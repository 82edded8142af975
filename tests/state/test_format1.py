"""Runs that the version before has written, with the first format of the store: they are read and gone on
with.

data/format1.tar.gz holds runs of the driver as that version left them: `finished`; `killed` in the third
commit; `solving`, killed in the second one, behind the files of a solution.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from state.durable import Disk
from state.errors import DamagedStore
from state.head import Cursor
from state.objects import solutions
from state.reader import open_run
from state.repair import repair_run
from state.store import RunWriter
from state.update import Update
from tests.state import driver
from tests.state.test_crash import tree

ARCHIVE = Path(__file__).parent / "data/format1.tar.gz"


@pytest.fixture
def old(tmp_path: Path, unsynced: None) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def test_it_is_read_without_a_word(old: Path) -> None:
    reader = open_run(old / "finished")
    assert (reader.head.format, reader.head.number, reader.head.finished, reader.notes) == (1, 3, True, ())
    np.testing.assert_equal(dict(reader.generation().arrays), driver.statistics_after(3))
    assert reader.solution("awq-test", 2).attributes == {"alpha": 0.5}
    assert reader.record == driver.RECORD


def test_it_is_gone_on_with_in_the_format_of_now(old: Path) -> None:
    with RunWriter.resume(old / "finished") as writer:
        assert writer.notes == ()
        head = writer.commit(Update(Cursor(pass_number=1), True))
    assert (head.format, head.number, head.generation) == (2, 4, "g000003")
    reader = open_run(old / "finished")
    assert (reader.head, reader.notes) == (head, ())
    assert (old / "finished/heads/run.json").read_bytes() == (old / "finished/run.json").read_bytes()


@pytest.mark.parametrize("name", ["killed", "solving"])
def test_what_a_killed_commit_of_it_left_is_set_aside_and_the_end_is_the_same(
    old: Path, tmp_path: Path, name: str
) -> None:
    driver.drive(tmp_path / "undisturbed")
    notes = driver.drive(old / name)
    assert len(notes) == 1 and "files are set aside" in notes[0]
    assert tree(old / name) == tree(tmp_path / "undisturbed")
    assert driver.drive(old / name) == ()


def test_its_solutions_are_lost_one_by_one_too(old: Path) -> None:
    (old / "finished/calibration.zarr/solutions/awq-test/2/scale/c.0").write_bytes(b"")
    assert solutions(open_run(old / "finished").head.objects) == {}
    assert open_run(old / "finished").head.number == 3


def test_without_its_heads_it_is_refused_by_name(old: Path) -> None:
    run = old / "finished"
    for path in (run / "HEAD", *(run / "heads").iterdir()):
        path.unlink()
    with pytest.raises(DamagedStore, match="holdfast repair"):
        open_run(run)
    with pytest.raises(DamagedStore, match="Nothing was touched"):
        repair_run(run, Disk())
