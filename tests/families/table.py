"""docs/families.md, from the results."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from tests.families.catalogue import FAMILIES
from tests.families.cells import COLUMNS, PARITY

TITLES = (*(column.title for column in COLUMNS), PARITY)
LONGEST = 200  # characters of a reason

HEAD = """# Families

`make test-families` writes this table. Each row is a tiny model in its hub's own layout (tests/families),
taken through `calibrate` and `export` with each recipe, with the whole model and layer by layer. An
independent reader compares what was exported with what the writer wrote and with an own forward: weights,
scales, everything that must stay as it is, exclude lists, config.json and files, and for solved weights the
logits.

"works": exported and right under both schedules; in the last column: equal to modelopt's own exports in FP8
and in NVFP4 with an FP8 KV cache, but for the differences that docs/parity.md lists. A number stands for a
reason below the table.
"""


def write_table(work: Path, file: Path) -> None:
    """Write the table from the results of all families."""
    reasons: dict[str, int] = {}
    rows = []
    for name in FAMILIES:
        cells = json.loads((work / f"{name}.json").read_text())["cells"]
        shown = FAMILIES[name]().loading_shown
        rows.append([name, *(entry(title, cells, reasons, shown) for title in TITLES)])
    titles = ["family", *TITLES]
    lines = [HEAD, "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"{number}. {text}" for text, number in reasons.items())]
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def entry(column: str, cells: list[dict[str, Any]], reasons: dict[str, int], shown: bool) -> str:
    """One entry: the verdict, for each schedule where they differ."""
    found = [cell for cell in cells if cell["column"] == column]
    said = {cell["schedule"]: verdict(cell, reasons, shown) for cell in found}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{schedule}: {text}" for schedule, text in said.items())


def verdict(cell: dict[str, Any], reasons: dict[str, int], shown: bool) -> str:
    """The verdict of a cell, with the number of its reason."""
    if cell["verdict"] == "works":
        return "works" if shown or cell["column"] == PARITY else "exported, loading not shown"
    number = reasons.setdefault(few_words(cell["said"][0]), len(reasons) + 1)
    return f"{cell['verdict']} ({number})"


def few_words(said: str) -> str:
    """A reason without the numbers of layers and the recipe's name, cut where it gets long."""
    general = re.sub(r"(?<=\.)\d+(?=\.)", "N", re.sub(r"recipe '[^']+'", "the recipe", said))
    general = re.sub(r"(?:, [\w.]+_quantizer)+", " ...", general)
    return textwrap.shorten(general, LONGEST, placeholder=" ...")
