"""Splits as they are written, and by the names of files."""

from pathlib import PurePath

import pytest

from stages.calibrate.text.splits import Split, read_split, split_of
from state.errors import InputError


@pytest.mark.parametrize(
    ("written", "split", "bounds"),
    [
        ("train", Split("train"), (0, None)),
        ("train_sft", Split("train_sft"), (0, None)),
        ("train[:]", Split("train"), (0, None)),
        ("train[:3]", Split("train", "", "3"), (0, 3)),
        ("train[2:3]", Split("train", "2", "3"), (2, 3)),
        ("test[:10%]", Split("test", "", "10%"), (0, 2)),
        ("test[10%:35%]", Split("test", "10%", "35%"), (2, 5)),
        ("test[-25%:]", Split("test", "-25%"), (11, None)),
        ("test[-2:]", Split("test", "-2"), (13, None)),
        ("test[-99:]", Split("test", "-99"), (0, None)),
    ],
)
def test_bounds_of_fifteen_rows(written: str, split: Split, bounds: tuple[int, int | None]) -> None:
    assert read_split(written) == split
    assert split.bounds(15) == bounds


@pytest.mark.parametrize(
    "written", ["", "train+test", "train[", "train[1]", "train[:x]", "train[:1.5]", "a b"]
)
def test_other_splits_are_refused(written: str) -> None:
    with pytest.raises(InputError, match="one split is needed, such as train"):
        read_split(written)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00003-abc.parquet", "train_sft"),
        ("train/data-00000-of-00001.arrow", "train"),
        ("test/train.jsonl", "test"),
        ("wiki.valid.txt", "validation"),
        ("val.jsonl.gz", "validation"),
        ("my_test_2.csv", "test"),
        ("contest.csv", "train"),
        ("trains.csv", "train"),
        ("a.jsonl", "train"),
    ],
)
def test_a_name_tells_the_split(name: str, split: str) -> None:
    assert split_of(PurePath("/test/x") / name, PurePath("/test/x")) == split
