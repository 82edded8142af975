"""One part's result: a table for people, figures for `--json`."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    rows: a label and one cell per column. notes: lines below the table. figures: the numbers behind it, in
    seconds, bytes and plain ratios.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    figures: Mapping[str, float]

    def table(self) -> Table:
        """What is printed; notes become the caption."""
        table = Table(
            title=self.title,
            title_justify="left",
            caption="\n".join(self.notes),
            caption_justify="left",
        )
        table.add_column("")
        for column in self.columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table
