"""Which of the files at DATA are read."""

from pathlib import Path

import pytest

from stages.calibrate.text.files import DataUnreachable, find_files
from stages.calibrate.text.left_out import LeftOut
from state.errors import InputError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def found(data: Path, within: Path, split: str = "train", left_out: LeftOut | None = None) -> list[str]:
    files = find_files(str(data), split, left_out or LeftOut())
    assert files is not None
    return [str(file.relative_to(within)) for file in files]


def test_folders_and_globs_are_sorted_by_path(tmp_path: Path) -> None:
    make(tmp_path, "sub/b.txt", "z.MD", "a.txt.gz", "image.png")
    assert found(tmp_path, tmp_path) == ["a.txt.gz", "sub/b.txt", "z.MD"]
    assert found(tmp_path / "**" / "*.txt*", tmp_path) == ["a.txt.gz", "sub/b.txt"]


def test_tables_win_over_prose_in_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "README.md", "notes.txt", "sub/more.CSV.zst")
    left_out = LeftOut()
    assert found(tmp_path, tmp_path, left_out=left_out) == ["a.jsonl", "sub/more.CSV.zst"]
    assert left_out.said() == ["1 file(s) of DATA are left out: prose beside tables"]


def test_a_readme_is_no_text_of_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "ReadMe.md")
    with pytest.raises(InputError, match=r"no file in this folder is a text \(a README is none\)"):
        found(tmp_path, tmp_path)
    assert found(tmp_path / "ReadMe.md", tmp_path) == ["ReadMe.md"]


def test_what_is_kept_beside_the_rows_is_no_table(tmp_path: Path) -> None:
    make(tmp_path, "train/data-00000-of-00001.arrow", "train/state.json", "train/dataset_info.json")
    make(
        tmp_path,
        "dataset_dict.json",
        "train/cache-1f.arrow",
        ".cache/x.json",
        "test/data-00000-of-00001.arrow",
    )
    assert found(tmp_path, tmp_path) == ["train/data-00000-of-00001.arrow"]
    assert found(tmp_path, tmp_path, "test") == ["test/data-00000-of-00001.arrow"]


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    make(tmp_path, "train-1.jsonl", "train-2.jsonl", "test.jsonl", "dev.jsonl")
    left_out = LeftOut()
    assert found(tmp_path, tmp_path, left_out=left_out) == ["train-1.jsonl", "train-2.jsonl"]
    assert left_out.said() == [
        "1 file(s) of DATA are left out: split test",
        "1 file(s) of DATA are left out: split validation",
    ]
    assert found(tmp_path / "*.jsonl", tmp_path, "validation") == ["dev.jsonl"]


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "test.jsonl")
    message = r"holds no split train but test, .* --split test"
    with pytest.raises(InputError, match=message):
        found(tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"holds no split validation but test"):
        found(tmp_path / "test.jsonl", tmp_path, "validation")


def test_a_file_that_was_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    make(tmp_path, "test.jsonl")
    assert found(tmp_path / "test.jsonl", tmp_path) == ["test.jsonl"]
    assert found(tmp_path / "test.jsonl", tmp_path, "test") == ["test.jsonl"]
    assert found(tmp_path / "te*.jsonl", tmp_path) == ["test.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.docx", r"a\.docx: its suffix \.docx is not known"),
        ("a", r"a: it has no suffix"),
        ("a.gz", r"a\.gz: "),
    ],
)
def test_other_suffixes_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    make(tmp_path, name)
    for data in (tmp_path / name, tmp_path / "*"):
        with pytest.raises(InputError, match=message):
            found(data, tmp_path)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json.gz", "none-*.txt", "./missing"])
def test_a_missing_file_is_no_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataUnreachable, match=r"no such file|no file matches"):
        find_files(name, "train", LeftOut())
    assert find_files("org/name", "train", LeftOut()) is None
