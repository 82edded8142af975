"""The folder of an export: resuming, refusing, publishing; kills and full disks at every operation."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.export.folder import open_folder
from stages.export.records import IDENTITY as IDENTITY_FILE
from stages.export.records import JOURNAL, MARK, REPORT
from stages.export.standing import Wanted
from state.durable import Disk
from state.errors import DamagedStore, IdentityMismatch, InputError, OutOfSpace, RunBusy, WriteFailed
from state.identity import Difference
from tests.stages.export.kill_driver import FILES, IDENTITY, OTHER, SHARDS, CountPuts, make, tree

ROOT = Path(__file__).parents[3]


class FailAt(Disk):
    """Reports `code` at operation number `at`."""

    def __init__(self, at: int, code: int) -> None:
        self.left, self.code = at, code

    def before(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))


def test_a_finished_export(tmp_path: Path) -> None:
    make(tmp_path / "out", IDENTITY, Disk())
    assert sorted(tree(tmp_path / "out")) == sorted([*FILES, IDENTITY_FILE, JOURNAL])
    assert json.loads((tmp_path / "out" / IDENTITY_FILE).read_text()) == IDENTITY
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_the_identity_of_a_checkpoint_has_these_bytes(tmp_path: Path) -> None:
    make(tmp_path / "out", IDENTITY, Disk())
    expected = b'{\n  "recipe": "xxh3:2",\n  "run.statistics": "xxh3:1"\n}\n'
    assert (tmp_path / "out" / IDENTITY_FILE).read_bytes() == expected


def test_the_same_again_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "out", IDENTITY, Disk())
    make(tmp_path / "out", IDENTITY, FailAt(0, errno.EIO))


def test_an_export_of_the_version_before_is_found_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    (out / JOURNAL).write_text("".join(line for line in lines if IDENTITY_FILE not in line))
    make(out, IDENTITY, FailAt(0, errno.EIO))


def test_killed_at_every_operation(tmp_path: Path) -> None:
    driver = [sys.executable, "-m", "tests.stages.export.kill_driver", str(tmp_path)]
    result = subprocess.run(driver, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    survived = json.loads(result.stdout)
    assert survived.pop("torch") is False
    assert survived["fresh"] >= 40 and survived["resumed"] >= 25
    assert survived["overwrite"] >= 80 and survived["foreign"] >= 80 and survived["other partial"] >= 50


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_an_error_at_every_operation(
    tmp_path: Path, code: int, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    make(tmp_path / "whole", IDENTITY, Disk())
    whole = tree(tmp_path / "whole")
    expected = {errno.ENOSPC: OutOfSpace, errno.EIO: WriteFailed}.get(code, InputError)
    operation = 0
    while True:
        out = tmp_path / str(operation) / "out"
        if older:
            make(out, OTHER, Disk())
        before = tree(out)
        try:
            make(out, IDENTITY, FailAt(operation, code), overwrite=older)
        except expected as error:
            assert str(out.parent) in str(error)
        else:
            break
        left = tree(out)
        assert left in (before, whole) or MARK in left
        make(out, IDENTITY, Disk(), overwrite=older)
        assert tree(out) == whole
        operation += 1
    assert operation >= 40


def test_journaled_files_are_not_written_again(tmp_path: Path) -> None:
    want = Wanted(IDENTITY, SHARDS)
    with open_folder(tmp_path / "out", want, Disk()) as folder:
        folder.write(SHARDS[0], b"first")
    disk = CountPuts()
    with open_folder(tmp_path / "out", want, disk) as folder:
        assert set(folder.journal) == {IDENTITY_FILE, SHARDS[0]} and not folder.finished
        folder.write(SHARDS[1], b"second")
        folder.publish()
    assert disk.put_names == [SHARDS[1]]
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == b"first"


def test_a_checkpoint_that_lacks_a_file_is_never_published(tmp_path: Path) -> None:
    with open_folder(tmp_path / "out", Wanted(IDENTITY, SHARDS), Disk()) as folder:
        folder.write(SHARDS[0], b"first")
        with pytest.raises(ValueError, match=SHARDS[1]):
            folder.publish()
    assert not (tmp_path / "out").exists()


def test_a_journaled_file_whose_bytes_changed_is_written_again(tmp_path: Path) -> None:
    want = Wanted(IDENTITY, SHARDS[:1])
    with open_folder(tmp_path / "out", want, Disk()) as folder:
        folder.write(SHARDS[0], b"first")
    (tmp_path / "out.partial" / SHARDS[0]).write_bytes(b"First")
    with open_folder(tmp_path / "out", want, Disk()) as folder:
        assert set(folder.journal) == {IDENTITY_FILE}
        folder.write(SHARDS[0], b"first")
        folder.publish()
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == b"first"


@pytest.mark.parametrize("content", [b"fir", b""])
def test_a_journaled_file_of_another_size_may_be_somebody_elses(tmp_path: Path, content: bytes) -> None:
    want = Wanted(IDENTITY, SHARDS[:1])
    with open_folder(tmp_path / "out", want, Disk()) as folder:
        folder.write(SHARDS[0], b"first")
    path = tmp_path / "out.partial" / SHARDS[0]
    path.write_bytes(content)
    with (
        pytest.raises(DamagedStore, match=rf"{SHARDS[0]} is not as Holdfast wrote it.*Move it away"),
        open_folder(tmp_path / "out", want, Disk()),
    ):
        pass
    assert path.read_bytes() == content
    path.unlink()
    with open_folder(tmp_path / "out", want, Disk()) as folder:
        assert set(folder.journal) == {IDENTITY_FILE}


@pytest.mark.parametrize(
    ("report", "stored"),
    [
        (b'{"recipe": "fp8"}', "fp8 (xxh3:9)"),
        (b"{}", "xxh3:9"),
        (b"[]", "xxh3:9"),
        (b"torn", "xxh3:9"),
        (None, "xxh3:9"),
    ],
)
def test_another_recipe_is_named_where_the_report_tells_it(
    tmp_path: Path, report: bytes | None, stored: str
) -> None:
    with open_folder(tmp_path / "out", Wanted(OTHER, (REPORT, SHARDS[0])), Disk()) as folder:
        if report is not None:
            folder.write(REPORT, report)
        folder.write(SHARDS[0], b"first")
    named = re.escape(f"  recipe: stored {stored}, now nvfp4 (xxh3:2)\n")
    with (
        pytest.raises(IdentityMismatch, match=named) as caught,
        open_folder(tmp_path / "out", Wanted(IDENTITY, (REPORT, SHARDS[0]), "nvfp4"), Disk()),
    ):
        pass
    assert caught.value.differences == (Difference("recipe", "xxh3:9", "xxh3:2"),)


@pytest.mark.parametrize("finished", [True, False])
def test_another_export_is_refused_by_field(tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    make(out, OTHER, Disk(), shards=len(SHARDS) if finished else 1)
    before = tree(tmp_path)
    with pytest.raises(IdentityMismatch, match=r"recipe: stored xxh3:9, now xxh3:2\n.*--overwrite") as caught:
        make(out, IDENTITY, Disk())
    assert [difference.field for difference in caught.value.differences] == ["recipe"]
    assert tree(tmp_path) == before
    make(out, IDENTITY, Disk(), overwrite=True)
    assert json.loads((out / IDENTITY_FILE).read_text()) == IDENTITY
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_damage_is_found_and_overwritten_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    whole = tree(out)
    (out / SHARDS[1]).write_bytes(whole[SHARDS[1]][:-1] + b"\xff")
    with pytest.raises(DamagedStore, match=f"{SHARDS[1]} is missing or damaged.*--overwrite") as caught:
        make(out, IDENTITY, Disk())
    assert caught.value.objects == (SHARDS[1],)
    make(out, IDENTITY, Disk(), overwrite=True)
    assert tree(out) == whole


def test_a_replacement_cut_short_goes_on_unasked_only_with_what_was_to_come(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, OTHER, Disk())
    operation = 60
    while MARK not in tree(out) or JOURNAL in tree(out):
        with pytest.raises(OutOfSpace):
            make(out, IDENTITY, FailAt(operation, errno.ENOSPC), overwrite=True)
        operation = 5
    moved = tmp_path / "moved"
    (tmp_path / "out.partial").rename(moved)
    with pytest.raises(DamagedStore, match=r"was being replaced.*--overwrite"):
        make(out, IDENTITY, Disk())
    moved.rename(tmp_path / "out.partial")
    make(out, IDENTITY, Disk())
    make(tmp_path / "whole", IDENTITY, Disk())
    assert tree(out) == tree(tmp_path / "whole")


def test_an_unfinished_export_that_lost_its_journal_is_damaged(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    operation = 0
    while not (partial / SHARDS[0]).exists():
        with pytest.raises(OutOfSpace):
            make(out, IDENTITY, FailAt(operation, errno.ENOSPC))
        operation += 1
    (partial / JOURNAL).unlink()
    left = tree(partial)
    with pytest.raises(DamagedStore, match=r"holdfast_journal\.jsonl is missing; .*Move .*out\.partial away"):
        make(out, IDENTITY, Disk())
    assert tree(partial) == left


def test_an_empty_folder_may_become_the_export(tmp_path: Path) -> None:
    for name in ("out", "out.partial", ".out.partial"):
        (tmp_path / name).mkdir()
    make(tmp_path / "out", IDENTITY, Disk())
    assert (tmp_path / "out" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_a_second_exporter_is_refused_and_a_killed_one_frees_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from stages.export.folder import open_folder; "
        "from stages.export.standing import Wanted; from state.durable import Disk\n"
        f"with open_folder(Path({str(tmp_path / 'out')!r}), Wanted({{}}, ()), Disk()):\n"
        " print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RunBusy, match=r"another process is exporting to .*out\."):
        make(tmp_path / "out", {}, Disk())
    holder.kill()
    holder.wait()
    shutil.rmtree(tmp_path / "out.partial")
    make(tmp_path / "out", IDENTITY, Disk())
