"""Which files DATA stands for, and which of them are read: tables before prose, one split, no odd ones."""

from collections.abc import Mapping
from pathlib import Path

from stages.calibrate.text.left_out import LeftOut
from stages.calibrate.text.opening import COMPRESSIONS, kind_of
from stages.calibrate.text.splits import DEFAULT, split_of
from state.errors import InputError
from state.home import expand_home

TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
PROSE = (".txt", ".md", ".rst")
SUFFIXES = TABLES + PROSE
FORMS = (
    f"a file ({', '.join(SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}), a folder or glob of these, "
    "or the name of a data set"
)

RECORDS = frozenset(
    {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
)
"""What `datasets` writes beside the rows, about them."""


class DataUnreachable(InputError):
    """There is no such file, and no such data set can be loaded (now)."""


def find_files(data: str, split: str, left_out: LeftOut) -> list[Path] | None:
    """The files of one split that `data` stands for, sorted by path, or None where it can only be the name of
    a data set. All are tables, or all are prose.

    Raises:
        DataUnreachable: there is no such file.
        InputError: a suffix is unknown, nothing readable is in a folder, or the split isn't there.
    """
    path = expand_home(data)
    if path.is_file():
        _refuse_unknown(path)
        return _of_split(data, {path: split_of(path, path.parent)}, split, left_out, named=True)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_text(file, path))
        if not found:
            raise InputError(
                f"DATA {data}: no file in this folder is a text (a README is none). Such are: {FORMS}."
            )
        return _chosen(data, found, path, split, left_out, named=False)
    if any(char in data for char in "*?["):
        anchor = Path(path.anchor)
        found = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        if not found:
            raise DataUnreachable(f"DATA {data}: no file matches.")
        for file in found:
            _refuse_unknown(file)
        return _chosen(data, found, _fixed(path), split, left_out, named=True)
    if data.startswith(("/", ".", "~")) or kind_of(path) in SUFFIXES or data.count("/") > 1:
        raise DataUnreachable(f"DATA {data}: no such file. DATA is {FORMS}.")
    return None


def is_table(file: Path) -> bool:
    """Whether a file holds rows, rather than one document."""
    return kind_of(file) in TABLES


def _refuse_unknown(file: Path) -> None:
    if kind_of(file) not in SUFFIXES:
        kind = f"its suffix {file.suffix} is not known" if file.suffix else "it has no suffix"
        raise InputError(
            f"DATA {file}: {kind}. DATA is {FORMS}. A plain text is read once its name ends in .txt."
        )


def _is_text(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is one that a person would mean: no README, no record, nothing hidden."""
    relative = file.relative_to(folder)
    if kind_of(file) not in SUFFIXES or any(part.startswith((".", "__")) for part in relative.parts):
        return False
    name = file.name.lower()
    if is_table(file):
        return name not in RECORDS and not name.startswith("cache-")
    return name.partition(".")[0] != "readme"


def _chosen(
    data: str, found: list[Path], within: Path, split: str, left_out: LeftOut, named: bool
) -> list[Path]:
    tables = [file for file in found if is_table(file)]
    if tables and len(tables) < len(found):
        left_out.files["prose beside tables"] += len(found) - len(tables)
    files = {file: split_of(file, within) for file in tables or found}
    return _of_split(data, files, split, left_out, named)


def _of_split(data: str, files: Mapping[Path, str], split: str, left_out: LeftOut, named: bool) -> list[Path]:
    """The files of a split. Those of a single one that were `named`, and not found in a folder, are what is
    wanted unless another split was asked for.
    """
    splits = sorted(set(files.values()))
    if named and len(splits) == 1 and split == DEFAULT:
        return list(files)
    if split not in splits:
        there = ", ".join(splits)
        raise InputError(
            f"DATA {data} holds no split {split} but {there}, by the names of its files. "
            f"Choose with --split, such as --split {splits[0]}."
        )
    for other in splits:
        if other != split:
            left_out.files[f"split {other}"] += sum(name == other for name in files.values())
    return [file for file, name in files.items() if name == split]


def _fixed(pattern: Path) -> Path:
    """The part of a glob that names one folder."""
    for parent in reversed((pattern, *pattern.parents)):
        if any(char in parent.name for char in "*?["):
            return parent.parent
    return pattern.parent
