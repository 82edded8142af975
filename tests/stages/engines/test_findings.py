"""The rules by name, and what is written of them."""

import re
from pathlib import Path

from stages.engines import ENGINES
from stages.engines.algos import ALGOS
from stages.engines.findings import RULES, without_path

DOCS = Path(__file__).parents[3] / "docs" / "verify.md"


def test_every_rule_is_documented_as_it_reads() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {rule: rows.get(rule) for rule in RULES} == RULES


def test_the_table_of_formats_is_the_one_that_is_gone_by() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for algo in ALGOS.values():
        kinds = [table.get(engine, frozenset()) for table in (algo.loads, algo.mixed) for engine in ENGINES]
        cells = ["yes" if len(kind) == 2 else "linears" if kind else "-" for kind in kinds]
        assert f"| {algo.name} | {' | '.join(cells)} |" in text


def test_reports_name_no_folder() -> None:
    folder = Path("/data/out")
    assert without_path(folder, "/data/out/config.json is missing in /data/out") == (
        "config.json is missing in the folder"
    )
