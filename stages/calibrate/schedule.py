"""What every schedule has in common: a series of steps from a cursor to the end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from state.store import Cursor


@dataclass(frozen=True)
class Step:
    """A piece of work after which a commit is possible. cursor: where the next step begins. tokens: how many
    it took in.
    """

    cursor: Cursor
    tokens: int


class Schedule(Protocol):
    """An order in which the model meets the tokens."""

    def total(self) -> int:
        """How many steps there are from the start."""

    def done(self, cursor: Cursor) -> int:
        """How many steps lie before a cursor."""

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        """Do the work from a cursor on, one step at a time."""
