"""Tables, and the rows that several commands show."""

from collections.abc import Sequence

from stages.calibrate.summary import Coverage
from state.statistics import FEW_TOKENS

NAMED = 3  # examples given of what is listed in full elsewhere

Rows = Sequence[tuple[str, str]]


def coverage_rows(coverage: Coverage) -> Rows:
    """What was observed, and what the text hardly reached."""
    rows = [("sites", f"{coverage.sites:,}")]
    if coverage.experts:
        rows += [
            ("experts", f"{coverage.experts:,}"),
            ("without tokens", examples(coverage.unseen)),
            (f"under {FEW_TOKENS} tokens", examples(coverage.few)),
        ]
    rows.append(("dead channels", f"{coverage.dead_channels:,}"))
    if coverage.non_finite:
        rows.append(("not finite", examples(coverage.non_finite)))
    return rows


def examples(names: Sequence[str]) -> str:
    """`3: a, b, c`, `120: a, b, c, ...` or `0`."""
    if not names:
        return "0"
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names):,}: {', '.join(names[:NAMED])}{more}"


def print_rows(rows: Rows) -> None:
    """Two columns on standard output. Lines are never broken: what is to be typed next can be copied."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns on standard output, the first row their heads. Lines are never broken, as in `print_rows`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip())
