"""What is not ours stays: beside OUT, inside it, behind links, and under names that a record makes up."""

import json
import os
from pathlib import Path

import pytest

from pipeline.progress import PlainProgress
from stages.export.folder import open_folder
from stages.export.ownership import foreign, is_ours, obstacles, parents, remove_owned
from stages.export.records import JOURNAL, MARK, Mark, Written, encode_journal, encode_mark, written
from stages.export.standing import Wanted
from state.durable import Disk
from state.errors import DamagedStore, HoldfastError, InputError
from tests.stages.export.kill_driver import (
    FILES,
    FOREIGN,
    IDENTITY,
    OTHER,
    SHARDS,
    SMALL,
    add_foreign,
    make,
    tree,
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What the wanted export ends as."""
    make(tmp_path / "whole" / "out", IDENTITY, Disk())
    return tree(tmp_path / "whole" / "out")


def refuse(out: Path, kind: type[HoldfastError], message: str, overwrite: bool = True) -> None:
    """The export is refused with this message, and nothing has changed."""
    before = tree(out.parent)
    with pytest.raises(kind, match=message):
        make(out, IDENTITY, Disk(), overwrite)
    after = {name: data for name, data in tree(out.parent).items() if name != ".out.lock"}
    assert after == {name: data for name, data in before.items() if name != ".out.lock"}


def rename_in_journal(folder: Path, old: str, new: str) -> None:
    """Make the journal name another file in place of one, in the form that Holdfast writes."""
    entries = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    renamed = [entry | {"file": new} if entry["file"] == old else entry for entry in entries]
    renamed.sort(key=lambda entry: entry["file"])
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in renamed)
    (folder / JOURNAL).write_bytes(text.encode(errors="surrogatepass"))


class TestInsideOut:
    def test_overwrite_leaves_what_it_did_not_write(self, out: Path, whole: dict[str, bytes]) -> None:
        make(out, OTHER, Disk())
        add_foreign(out)
        (out / "empty").mkdir()
        inodes = {name: (out / name).stat().st_ino for name in FOREIGN}
        make(out, IDENTITY, Disk(), overwrite=True)
        assert tree(out) == whole | {name: f"by hand: {name}".encode() for name in FOREIGN}
        assert inodes == {name: (out / name).stat().st_ino for name in FOREIGN}
        assert (out / "empty").is_dir()

    def test_it_is_named(self, out: Path) -> None:
        make(out, OTHER, Disk())
        add_foreign(out)
        lines: list[str] = []
        with open_folder(out, Wanted(IDENTITY, FILES), Disk(), True, PlainProgress(lines.append)):
            pass
        assert any(
            f"{out} holds README.md, eval/, templates/chat/b.jinja, templates/mine.jinja, which" in line
            for line in lines
        )

    def test_a_file_of_ours_that_was_edited_is_not_ours_any_more(self, out: Path) -> None:
        make(out, OTHER, Disk())
        (out / "config.json").write_text("edited by hand, with care")
        refuse(out, InputError, r"config\.json is not as Holdfast wrote it.* Move it away")

    def test_a_foreign_file_where_the_export_needs_the_place(self, out: Path) -> None:
        with open_folder(out, Wanted(OTHER, SHARDS), Disk()) as folder:
            for name in SHARDS:
                folder.write(name, b"old")
            folder.publish()
        (out / "templates").write_text("a file where a folder is needed")
        refuse(out, InputError, "templates is not as Holdfast wrote it, or not Holdfast's")

    def test_old_files_that_the_new_export_lacks_are_removed(self, out: Path) -> None:
        make(out, OTHER, Disk())
        with open_folder(out, Wanted(IDENTITY, SHARDS[:1]), Disk(), overwrite=True) as folder:
            folder.write(SHARDS[0], b"new")
            folder.publish()
        assert sorted(path.name for path in out.iterdir()) == [
            "holdfast_export.json",
            JOURNAL,
            SHARDS[0],
        ]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_other_peoples_folders(self, out: Path, overwrite: bool) -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("dear")
        refuse(out, InputError, "out exists and is no export of Holdfast", overwrite)

    def test_what_came_into_an_empty_folder_meanwhile(self, out: Path) -> None:
        with open_folder(out, Wanted(IDENTITY, SHARDS[:1]), Disk()) as folder:
            folder.write(SHARDS[0], b"new")
            out.mkdir()
            (out / "thesis.txt").write_text("dear")
            with pytest.raises(InputError, match=r"was empty and now holds thesis\.txt"):
                folder.publish()
        assert tree(out) == {"thesis.txt": b"dear"}


def test_what_is_damaged_and_written_again_is_said(out: Path) -> None:
    make(out, IDENTITY, Disk(), shards=1)
    (out.with_name("out.partial") / SHARDS[0]).unlink()
    lines: list[str] = []
    with open_folder(out, Wanted(IDENTITY, FILES), Disk(), False, PlainProgress(lines.append)):
        pass
    assert any(f"{SHARDS[0]} is missing or damaged; it is written again" in line for line in lines)


class TestBesideOut:
    @pytest.mark.parametrize("name", ["out.partial", "out.replaced", ".out.partial"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_finished_export_of_that_name(
        self, out: Path, name: str, overwrite: bool, whole: dict[str, bytes]
    ) -> None:
        make(out.with_name(name), OTHER, Disk())
        before = tree(out.with_name(name))
        if name == "out.replaced":
            make(out, IDENTITY, Disk(), overwrite)
            assert tree(out) == whole
        else:
            refuse(out, InputError, rf"/{name} .*move it away", overwrite)
            assert not out.exists()
        assert tree(out.with_name(name)) == before

    @pytest.mark.parametrize("name", ["out.partial", ".out.partial"])
    def test_other_peoples_folders_and_files(self, out: Path, name: str) -> None:
        out.with_name(name).mkdir()
        (out.with_name(name) / "thesis.txt").write_text("dear")
        refuse(out, InputError, rf"/{name} .*move it away")
        (out.with_name(name) / "thesis.txt").unlink()
        out.with_name(name).rmdir()
        out.with_name(name).write_text("dear")
        refuse(out, InputError, rf"/{name} is in the way: it is no folder")

    def test_an_unfinished_export_to_another_place(self, out: Path) -> None:
        make(out.with_name("other"), IDENTITY, Disk(), shards=1)
        out.with_name("other.partial").rename(out.with_name("out.partial"))
        refuse(out, InputError, "out.partial exists and is not Holdfast's unfinished export to out")
        out.with_name("out.partial").rename(out)
        refuse(out, InputError, r"rename it back to other\.partial")

    def test_foreign_files_in_the_unfinished_export(self, out: Path, whole: dict[str, bytes]) -> None:
        make(out, IDENTITY, Disk(), shards=1)
        (out.with_name("out.partial") / "notes").mkdir()
        (out.with_name("out.partial") / "notes" / "stray.safetensors").write_text("dear")
        make(out, IDENTITY, Disk())
        assert tree(out) == whole
        assert tree(out.with_name("out.partial")) == {"notes/stray.safetensors": b"dear"}

    def test_and_in_one_that_would_be_removed(self, out: Path) -> None:
        make(out, OTHER, Disk(), shards=1)
        (out.with_name("out.partial") / "notes.txt").write_text("dear")
        refuse(out, InputError, r"out\.partial would be removed, but holds notes\.txt")

    def test_a_foreign_file_under_a_name_that_is_to_be_written(self, out: Path) -> None:
        make(out, IDENTITY, Disk(), shards=1)
        (out.with_name("out.partial") / SHARDS[1]).write_text("dear")
        refuse(out, InputError, rf"{SHARDS[1]} is not as Holdfast wrote it, or not Holdfast's")

    @pytest.mark.parametrize("content", ["a poem\n", "12 monkeys"])
    def test_a_file_that_is_no_lock(self, out: Path, content: str) -> None:
        out.with_name(".out.lock").write_text(content)
        with pytest.raises(InputError, match=r"\.out\.lock is in the way: it is no lock of Holdfast"):
            make(out, IDENTITY, Disk())
        assert out.with_name(".out.lock").read_text() == content


class TestLinks:
    @pytest.fixture
    def victim(self, tmp_path: Path) -> Path:
        (tmp_path / "victim").mkdir()
        (tmp_path / "victim" / SHARDS[0]).write_text("dear")
        return tmp_path / "victim"

    def test_a_shard_that_is_a_link(self, out: Path, victim: Path) -> None:
        make(out, OTHER, Disk())
        size = (out / SHARDS[0]).stat().st_size
        (victim / SHARDS[0]).write_bytes(b"x" * size)
        (out / SHARDS[0]).unlink()
        (out / SHARDS[0]).symlink_to(victim / SHARDS[0])
        refuse(out, InputError, f"{SHARDS[0]} is not as Holdfast wrote it")
        assert (out / SHARDS[0]).is_symlink()

    def test_a_folder_that_is_a_link(self, out: Path, tmp_path: Path) -> None:
        make(out, OTHER, Disk())
        (out / "templates").rename(tmp_path / "moved")
        (out / "templates").symlink_to(tmp_path / "moved")
        refuse(out, InputError, "templates is not as Holdfast wrote it")

    def test_a_link_among_foreign_files_stays_a_link(self, out: Path, victim: Path) -> None:
        make(out, OTHER, Disk())
        (out / "eval").symlink_to(victim)
        make(out, IDENTITY, Disk(), overwrite=True)
        assert (out / "eval").readlink() == victim and tree(victim) == {SHARDS[0]: b"dear"}

    @pytest.mark.parametrize("name", [JOURNAL, MARK, "holdfast_export.json"])
    def test_a_record_that_is_a_link(self, out: Path, tmp_path: Path, name: str) -> None:
        make(out, OTHER, Disk(), shards=1)
        partial = out.with_name("out.partial")
        (partial / name).rename(tmp_path / "moved")
        (partial / name).symlink_to(tmp_path / "moved")
        refuse(out, DamagedStore, f"{name} is not the file that Holdfast wrote there")

    @pytest.mark.parametrize("name", [f"{JOURNAL}.tmp", "holdfast_writing.tmp"])
    def test_nothing_is_written_through_a_link(self, out: Path, victim: Path, name: str) -> None:
        make(out, IDENTITY, Disk(), shards=1)
        (out.with_name("out.partial") / name).symlink_to(victim / SHARDS[0])
        make(out, IDENTITY, Disk())
        assert tree(victim) == {SHARDS[0]: b"dear"}

    def test_a_lock_that_is_a_link(self, out: Path, victim: Path) -> None:
        out.with_name(".out.lock").symlink_to(victim / "lock")
        refuse(out, InputError, r"\.out\.lock is in the way")
        assert not (victim / "lock").exists()

    @pytest.mark.parametrize("name", ["out.partial", ".out.partial"])
    def test_the_unfinished_export_is_a_link(self, out: Path, victim: Path, name: str) -> None:
        out.with_name(name).symlink_to(victim)
        refuse(out, InputError, rf"/{name} is in the way: it is no folder")


class TestNamesFromElsewhere:
    NAMES = ("../victim", "/victim", "a/../../victim", "", ".", "..", "a//b", "a/", "./a", "nul\0", "\ud800")

    @pytest.mark.parametrize("name", [*NAMES, MARK, "x" * 256])
    @pytest.mark.parametrize("finished", [False, True])
    def test_in_a_journal(self, out: Path, name: str, finished: bool) -> None:
        make(out, OTHER, Disk(), shards=2 if finished else 1)
        folder = out if finished else out.with_name("out.partial")
        out.with_name("victim").write_bytes((folder / SHARDS[0]).read_bytes())
        rename_in_journal(folder, SHARDS[0], name)
        refuse(out, DamagedStore, f"{JOURNAL} is damaged")

    def test_in_a_mark(self, out: Path) -> None:
        make(out, OTHER, Disk())
        out.with_name("victim").write_text("dear")
        exchange = (Written("../victim", 4, written("", b"dear").digest),)
        (out / MARK).write_bytes(encode_mark(Mark("out", exchange)))
        refuse(out, DamagedStore, f"{MARK} is damaged")

    @pytest.mark.parametrize("name", [*NAMES, MARK, JOURNAL])
    def test_of_the_export_itself(self, out: Path, name: str) -> None:
        with pytest.raises(InputError), open_folder(out, Wanted(IDENTITY, [name]), Disk()):
            pass
        assert not out.parent.exists() or list(out.parent.iterdir()) == []

    def test_a_journal_that_names_somebody_elses_file(self, out: Path) -> None:
        make(out, OTHER, Disk(), shards=1)
        partial = out.with_name("out.partial")
        (partial / "thesis.txt").write_text("dear reader")
        entries = {"thesis.txt": Written("thesis.txt", 4, written("", b"dear").digest)}
        (partial / JOURNAL).write_bytes(encode_journal(entries))
        refuse(out, InputError, r"would be removed, but holds .*thesis\.txt")


class TestFunctions:
    def test_parents(self) -> None:
        assert parents("a/b/c") == ["a", "a/b"] and parents("a") == []

    def test_what_is_ours(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("1234")
        os.link(tmp_path / "file", tmp_path / "same")
        (tmp_path / "folder").mkdir()
        entries = {
            name: Written(name, 4, "xxh3:0") for name in ("file", "same", "folder", "absent", "file/x")
        }
        assert [name for name, entry in entries.items() if is_ours(tmp_path, entry)] == ["file", "same"]
        assert not is_ours(tmp_path, Written("file", 5, "xxh3:0"))

    def test_what_is_foreign_is_named_by_its_uppermost_folder(self, tmp_path: Path) -> None:
        for name in ("a/ours", "a/theirs", "b/c/theirs", "record", "file"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("1234")
        entries = [Written("a/ours", 4, ""), Written("file", 3, "")]
        assert foreign(Disk(), tmp_path, entries, ["record"]) == ["a/theirs", "b/", "file"]

    def test_obstacles(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "folder")
        names = ["file", "file/x", "folder", "folder/x", "link/x", "new/x"]
        assert obstacles(tmp_path, names, ()) == ["file", "folder", "link"]
        assert obstacles(tmp_path, names, ["file"]) == ["folder", "link"]

    def test_folders_are_removed_only_once_empty(self, tmp_path: Path) -> None:
        for name in (*SMALL, "templates/theirs"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("1234")
        remove_owned(Disk(), tmp_path, [Written(name, 4, "") for name in SMALL])
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["templates", "theirs"]
