"""docs/families.md, from the results."""

import json
from pathlib import Path
from typing import Any

from tests.families.catalogue import FAMILIES
from tests.families.cells import COLUMNS, SCHEDULES

HEAD = """# Families

`make test-families` writes this table. Each row is a tiny model in its hub's own layout (tests/families),
taken through `calibrate` and `export` with each recipe, with the whole model and layer by layer. An
independent reader compares what was exported with what the writer wrote and with an own forward: weights,
scales, everything that must stay as it is, exclude lists, config.json and files, and for solved weights the
logits.

"works": exported and right under both schedules. A number stands for a reason below the table.
"""


def write_table(work: Path, file: Path) -> None:
    """Write the table from the results of all families."""
    reasons: dict[str, int] = {}
    rows = []
    for name in FAMILIES:
        cells = json.loads((work / f"{name}.json").read_text())["cells"]
        rows.append([name, *(entry(column.title, cells, reasons) for column in COLUMNS)])
    titles = ["family", *(column.title for column in COLUMNS)]
    lines = [HEAD, "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"{number}. {text}" for text, number in reasons.items())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def entry(column: str, cells: list[dict[str, Any]], reasons: dict[str, int]) -> str:
    """One entry: the verdict, for each schedule where they differ."""
    said = {}
    for schedule in SCHEDULES:
        found = [cell for cell in cells if (cell["column"], cell["schedule"]) == (column, schedule)]
        said[schedule] = verdict(found[0], reasons) if found else "not run"
    if len(set(said.values())) == 1:
        return said[SCHEDULES[0]]
    return ", ".join(f"{schedule}: {text}" for schedule, text in said.items())


def verdict(cell: dict[str, Any], reasons: dict[str, int]) -> str:
    """The verdict of a cell, with the number of its reason."""
    if cell["verdict"] == "works":
        return "works"
    text = cell["said"][0]
    number = reasons.setdefault(text, len(reasons) + 1)
    return f"{cell['verdict']} ({number})"
