"""What of DATA calibration does not see, counted while it is read, to be said at the end."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LeftOut:
    """rows: records of tables that were read. nulls: those of them without a text. parts: type of a message's
    part that is no text → how many. columns: those that held images, videos or sounds. files: why → how many.
    """

    rows: int = 0
    nulls: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    files: Counter[str] = field(default_factory=Counter)

    def said(self) -> list[str]:
        """One line for each kind of thing that was left out."""
        lines = [f"{count:,} file(s) of DATA are left out: {why}" for why, count in self.files.items()]
        if self.nulls:
            lines.append(
                f"{self.nulls:,} of the {self.rows:,} rows read hold null and no text; they are left out"
            )
        if self.parts:
            parts = ", ".join(f"{count:,} of type {kind}" for kind, count in sorted(self.parts.items()))
            lines.append(f"parts of messages that are no text are left out: {parts}")
        if self.columns:
            names = ", ".join(sorted(self.columns))
            lines.append(f"calibration is on text: what is in {names} of DATA is left out")
        return lines
