"""`--split` as a person writes it: the name of a split, and which of its rows."""

import re
from dataclasses import dataclass
from pathlib import PurePath

from state.errors import InputError

WRITTEN = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", re.ASCII)

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words by which `datasets` knows the splits of files, in names of folders or files."""

DEFAULT = "train"
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*", re.ASCII)


@dataclass(frozen=True)
class Split:
    """start, stop: bounds of the rows wanted, as a number or a percentage, negative from the end; empty where
    none was written.
    """

    name: str
    start: str = ""
    stop: str = ""

    @property
    def whole(self) -> bool:
        """Whether all rows are wanted."""
        return not (self.start or self.stop)

    @property
    def counts(self) -> bool:
        """Whether the number of rows must be known to tell which are wanted."""
        return any(bound.startswith("-") or bound.endswith("%") for bound in (self.start, self.stop))

    def bounds(self, rows: int) -> tuple[int, int | None]:
        """The first row wanted and the first one behind those wanted, None for no end. `rows` counts where
        `counts` is true; percentages are rounded to the nearest row, as `datasets` does.
        """
        start = _bound(self.start, rows) if self.start else 0
        return start, _bound(self.stop, rows) if self.stop else None


def read_split(written: str) -> Split:
    """Raises InputError for anything but `NAME` and `NAME[FROM:TO]`; splits are not mixed."""
    match = WRITTEN.fullmatch(written.strip())
    if match is None:
        raise InputError(
            f"--split {written}: one split is needed, such as train, train[:1000] or train[10%:20%]."
        )
    return Split(match[1], match[2] or "", match[3] or "")


def split_of(file: PurePath, within: PurePath) -> str:
    """The split that a file in the folder `within` belongs to by its name, by the rules of `datasets`:
    `data/NAME-00000-of-00001.parquet`, a word for it in a folder's name, or in the file's own; else `train`.
    """
    if file.parent.name == "data" and (shard := SHARD.fullmatch(file.name)):
        return shard[1]
    *folders, name = file.relative_to(within).parts
    for part in (*reversed(folders), name):
        for split, words in KEYWORDS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)", part, re.ASCII):
                return split
    return DEFAULT


def _bound(written: str, rows: int) -> int:
    number = int(written.rstrip("%"))
    if written.endswith("%"):
        number = round(rows * number / 100)
    return min(max(rows + number, 0), rows) if written.startswith("-") else number
