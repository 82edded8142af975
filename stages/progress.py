"""How the stages report what they are doing, not knowing whether a person, a log file or nobody reads it."""

from typing import Protocol


class Progress(Protocol):
    """What a stage tells while it works. Any method may be called from any thread and returns at once."""

    def stage(self, title: str) -> None:
        """A new part of the work has begun, such as "loading the model". Ends the bar of the part before."""

    def start(self, title: str, total: int, unit: str, done: int = 0) -> None:
        """A bar of `total` units ("batches", "tokens", "bytes") begins; earlier processes did `done`."""

    def advance(self, amount: int, **facts: int) -> None:
        """`amount` more units of the bar are done; `facts` are amounts that came with them (tokens=16384)."""

    def committed(self, number: int, seconds: float) -> None:
        """Generation `number` is durable; writing it took `seconds`."""

    def note(self, message: str) -> None:
        """One line worth knowing."""

    def warn(self, message: str) -> None:
        """One line that may need an answer from the person."""

    def finish(self) -> None:
        """The bar is complete or abandoned; nothing more follows until the next `stage` or `start`."""


class Silent:
    """A Progress that says nothing: for library use and tests."""

    def stage(self, title: str) -> None: ...

    def start(self, title: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int, **facts: int) -> None: ...

    def committed(self, number: int, seconds: float) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def finish(self) -> None: ...
