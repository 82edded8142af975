"""What every schedule has in common: a series of steps from a cursor to the end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from state.head import Cursor
from state.update import Solution

Tick = Callable[[int], None]  # called after each batch with the tokens it took in


@dataclass(frozen=True)
class Step:
    """A piece of work after which a commit is possible.

    cursor: where the next step begins. finished: the statistics are complete. tokens: how many have gone
    through the model by now, or through the layers before `cursor.layer` where these come one by one.
    commit: worth a commit, however short ago the last one was. solutions: what a solver found on the way.
    outdated: layers whose stored solutions hold no more → the layer that has another one than they were made
    behind.
    """

    cursor: Cursor
    finished: bool
    tokens: int
    commit: bool = False
    solutions: tuple[Solution, ...] = ()
    outdated: Mapping[int, int] = field(default_factory=dict)


class Schedule(Protocol):
    """An order in which the model meets the tokens. A context manager: observers are attached within."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def total(self) -> int:
        """How many batches pass from the start to the end; layer by layer, each layer's."""

    def done(self, cursor: Cursor) -> int:
        """How many of them lie before a cursor."""

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        """Do the work from a cursor on, one step at a time."""
