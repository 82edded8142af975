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

from stages.export.folder import IDENTITY as IDENTITY_FILE
from stages.export.folder import JOURNAL, REPORT, open_folder
from state.durable import Disk
from state.errors import DamagedStore, IdentityMismatch, InputError, OutOfSpace, RunBusy
from state.identity import Difference
from tests.stages.export.kill_driver import IDENTITY, OTHER, SHARDS, CountPuts, make, tree

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
    assert sorted(tree(tmp_path / "out")) == ["config.json", IDENTITY_FILE, JOURNAL, *SHARDS]
    assert json.loads((tmp_path / "out" / IDENTITY_FILE).read_text()) == IDENTITY
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_the_same_again_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "out", IDENTITY, Disk())
    make(tmp_path / "out", IDENTITY, FailAt(0, errno.EIO))


def test_killed_at_every_operation(tmp_path: Path) -> None:
    driver = [sys.executable, "-m", "tests.stages.export.kill_driver", str(tmp_path)]
    result = subprocess.run(driver, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    survived = json.loads(result.stdout)
    assert survived.pop("torch") is False
    assert survived["fresh"] >= 25 and survived["overwrite"] > survived["fresh"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_at_every_operation(tmp_path: Path, code: int) -> None:
    make(tmp_path / "whole", IDENTITY, Disk())
    whole = tree(tmp_path / "whole")
    expected = InputError if code == errno.EACCES else OutOfSpace
    operation = 0
    while True:
        out = tmp_path / str(operation) / "out"
        try:
            make(out, IDENTITY, FailAt(operation, code))
        except expected as error:
            assert str(out.parent) in str(error)
        else:
            break
        assert not out.exists() or tree(out) == whole
        make(out, IDENTITY, Disk())
        assert tree(out) == whole
        operation += 1
    assert operation >= 25


def test_journaled_files_are_not_written_again(tmp_path: Path) -> None:
    with open_folder(tmp_path / "out", IDENTITY, Disk()) as folder:
        folder.write(SHARDS[0], b"first")
    disk = CountPuts()
    with open_folder(tmp_path / "out", IDENTITY, disk) as folder:
        assert set(folder.journal) == {SHARDS[0]} and not folder.finished
        folder.write(SHARDS[1], b"second")
        folder.publish()
    assert disk.put_names == [SHARDS[1]]
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == b"first"


@pytest.mark.parametrize("content", [b"fir", b"First", b""])
def test_a_journaled_file_whose_bytes_changed_is_not_trusted(tmp_path: Path, content: bytes) -> None:
    with open_folder(tmp_path / "out", IDENTITY, Disk()) as folder:
        folder.write(SHARDS[0], b"first")
    (tmp_path / "out.partial" / SHARDS[0]).write_bytes(content)
    with open_folder(tmp_path / "out", IDENTITY, Disk()) as folder:
        assert folder.journal == {}
        folder.write(SHARDS[0], b"first")
        folder.publish()
    assert (tmp_path / "out" / SHARDS[0]).read_bytes() == b"first"


def test_what_the_journal_does_not_name_is_not_published(tmp_path: Path) -> None:
    with open_folder(tmp_path / "out", IDENTITY, Disk()) as folder:
        folder.write("chat/a.jinja", b"a")
    (tmp_path / "out.partial" / "stray.safetensors").write_bytes(b"torn")
    with open_folder(tmp_path / "out", IDENTITY, Disk()) as folder:
        folder.publish()
    assert sorted(tree(tmp_path / "out")) == ["chat/a.jinja", IDENTITY_FILE, JOURNAL]


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
    with open_folder(tmp_path / "out", OTHER, Disk()) as folder:
        if report is not None:
            folder.write(REPORT, report)
        folder.write(SHARDS[0], b"first")
    named = re.escape(f"  recipe: stored {stored}, now nvfp4 (xxh3:2)\n")
    with (
        pytest.raises(IdentityMismatch, match=named) as caught,
        open_folder(tmp_path / "out", IDENTITY, Disk(), recipe="nvfp4"),
    ):
        pass
    assert caught.value.differences == (Difference("recipe", "xxh3:9", "xxh3:2"),)


@pytest.mark.parametrize("finished", [True, False])
def test_another_export_is_refused_by_field(tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    with open_folder(out, OTHER, Disk()) as folder:
        folder.write("config.json", b"old")
        if finished:
            folder.publish()
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


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_folders_are_never_touched(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match=f"{name} exists and is no export of Holdfast"):
        make(tmp_path / "out", IDENTITY, Disk(), overwrite)
    assert (tmp_path / name / "thesis.txt").read_text() == "dear"


def test_an_empty_folder_may_become_the_export(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", IDENTITY, Disk())
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("out", [Path(), Path("/"), Path("..")])
def test_places_that_cannot_be_made(out: Path) -> None:
    with pytest.raises(InputError, match="is no name for a folder"):
        make(out, IDENTITY, Disk())


def test_files_where_folders_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; OUT must be a folder"):
        make(tmp_path / "file", IDENTITY, Disk())
    with pytest.raises(InputError, match=r"file is not a folder, so .* can't be made"):
        make(tmp_path / "file" / "out", IDENTITY, Disk())


def test_a_second_exporter_is_refused_and_a_killed_one_frees_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from stages.export.folder import open_folder; "
        "from state.durable import Disk\n"
        f"with open_folder(Path({str(tmp_path / 'out')!r}), {{}}, Disk()):\n print('held', flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RunBusy, match=r"another process is exporting to .*out\."):
        make(tmp_path / "out", {}, Disk())
    holder.kill()
    holder.wait()
    shutil.rmtree(tmp_path / "out.partial")
    make(tmp_path / "out", IDENTITY, Disk())
