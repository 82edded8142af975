"""What a run of the laboratory found: a table for people, JSON for records."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.verdict import GOOD


@dataclass
class Part:
    """The results of one part of the laboratory. possible: how many trials there would be."""

    name: str
    possible: int
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Trials whose fault struck."""
        return sum(result["verdict"] != "missed" for result in self.results)

    def count(self, verdict: str) -> int:
        """How many ended so."""
        return sum(result["verdict"] == verdict for result in self.results)

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Those that must not be."""
        return [result for result in self.results if self.is_wrong(result)]

    @staticmethod
    def is_wrong(result: dict[str, Any]) -> bool:
        """Whether a result must not be."""
        return result["verdict"] not in (*GOOD, "missed")


def table(parts: Sequence[Part]) -> str:
    """All counts, one line for each part and fault."""
    lines = [_row("", "possible", "tried", "identical", "refused", "wrong", "missed")]
    for part in parts:
        lines.append(
            _row(
                part.name,
                part.possible,
                part.tried,
                part.count("identical"),
                part.count("refused by name"),
                len(part.wrong),
                part.count("missed"),
            )
        )
        for name, results in _by_fault(part.results):
            one = Part(name, 0, results)
            lines.append(
                _row(
                    f"  {name}",
                    "",
                    one.tried,
                    one.count("identical"),
                    one.count("refused by name"),
                    len(one.wrong),
                    one.count("missed"),
                )
            )
    words = Counter(result["verdict"] for part in parts for result in part.wrong)
    silent, foreign = words["silent"], words["foreign touched"]
    others = {word: count for word, count in words.items() if word not in ("silent", "foreign touched")}
    lines.append(f"silent {silent}, foreign files touched {foreign}, otherwise wrong {others or 'none'}")
    return "\n".join(lines)


def said(result: dict[str, Any]) -> str:
    """One result that must not be, as a line."""
    where = f"{result['stratum']} #{result['number']}"
    return f"{result['verdict']}: {result['scenario']}, {result['fault']} at {where}: {result['reason']}"


def write_json(path: Path, seed: int, parts: Iterable[Part]) -> None:
    """Write the results of all parts as one JSON object."""
    content = {
        "seed": seed,
        "parts": [
            {"name": part.name, "possible": part.possible, "tried": part.tried, "results": part.results}
            for part in parts
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _by_fault(results: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(result["fault"] for result in results)
    return [(name, [result for result in results if result["fault"] == name]) for name in sorted(names)]


def _row(name: str, *cells: object) -> str:
    return f"{name:<28}" + "".join(
        f"{cell:>11,}" if isinstance(cell, int) else f"{cell:>11}" for cell in cells
    )
