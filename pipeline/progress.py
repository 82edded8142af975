"""What a person sees while a stage works: one live bar on a terminal, a line now and then anywhere else."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from stages.progress import Progress as StageProgress

LINE_EVERY = 10.0  # seconds between two plain lines

Clock = Callable[[], float]


@dataclass
class Meter:
    """The numbers of one bar. `clock` gives seconds; work of earlier processes is in `done` alone."""

    title: str
    total: int
    unit: str
    done: int
    clock: Clock
    facts: dict[str, int] = field(default_factory=dict)
    commit_time: float | None = None

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._first = self.done

    def advance(self, amount: int, facts: dict[str, int]) -> None:
        """Counts `amount` units and adds up the facts."""
        self.done += amount
        for name, value in facts.items():
            self.facts[name] = self.facts.get(name, 0) + value

    def speed(self) -> str:
        """Tokens per second where tokens are told, else units per second; empty before the first unit."""
        seconds = self.clock() - self._began
        name = "tokens" if "tokens" in self.facts else self.unit
        amount = self.facts.get("tokens", self.done - self._first)
        return f"{quantity(amount / seconds, name)}/s" if amount and seconds > 0 else ""

    def counted(self) -> str:
        """`12/64 batches`."""
        if self.unit == "bytes":
            return f"{quantity(self.done, self.unit)} of {quantity(self.total, self.unit)}"
        return f"{self.done:,}/{quantity(self.total, self.unit)}"

    def left(self) -> str:
        """The time that the rest will take at the mean speed so far."""
        worked = self.done - self._first
        if not worked or self.done >= self.total:
            return ""
        return f"{duration((self.clock() - self._began) / worked * (self.total - self.done))} left"

    def commit_age(self) -> str:
        """How long ago the last commit was."""
        if self.commit_time is None:
            return ""
        return f"last commit {duration(self.clock() - self.commit_time)} ago"

    def line(self) -> str:
        """Everything, as one line."""
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        parts = (f"{self.title}: {self.counted()}{share}", self.speed(), self.left(), self.commit_age())
        return ", ".join(part for part in parts if part)


def quantity(amount: float, unit: str) -> str:
    """`16,384 tokens`; bytes as `1.2 GB`, powers of ten."""
    if unit != "bytes":
        return f"{amount:,.0f} {unit}"
    for scale, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= scale:
            return f"{amount / scale:.1f} {name}"
    return f"{amount:.0f} B"


def duration(seconds: float) -> str:
    """`42 s`, `3:07 min` or `2:24:00 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


class PlainProgress:
    """Progress as lines of text: for logs, pipes and CI. title: of what was begun last."""

    def __init__(self, write: Callable[[str], None], clock: Clock = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._meter: Meter | None = None
        self._last_line = 0.0
        self.title = ""
        self._lock = threading.Lock()  # commits are reported by the writer's thread

    def stage(self, title: str) -> None:
        self.title = title
        with self._lock:
            self._meter = None
            self._write(title)

    def start(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title = title
        with self._lock:
            self._meter = Meter(title, total, unit, done, self._clock)
            self._last_line = self._clock()
            if done:
                self._write(f"going on at {self._meter.counted()}")

    def advance(self, amount: int, **facts: int) -> None:
        with self._lock:
            if self._meter is None:
                return
            self._meter.advance(amount, facts)
            if self._clock() - self._last_line >= LINE_EVERY:
                self._write_line(self._meter)

    def committed(self, number: int, seconds: float) -> None:
        with self._lock:
            if self._meter is not None:
                self._meter.commit_time = self._clock()
            self._write(f"commit {number}, written in {seconds:.2f} s")

    def note(self, message: str) -> None:
        self._write(message)

    def warn(self, message: str) -> None:
        self._write(f"warning: {message}")

    def finish(self) -> None:
        with self._lock:
            if self._meter is not None:
                self._write_line(self._meter)
                self._meter = None

    def _write_line(self, meter: Meter) -> None:
        self._write(meter.line())
        self._last_line = self._clock()


class _MeterColumn(ProgressColumn):
    """A column whose text the task's meter gives, asked anew at every refresh, so that ages move."""

    def __init__(self, read: Callable[[Meter], str]) -> None:
        super().__init__()
        self._read = read

    def render(self, task: Task) -> Text:
        meter: Meter | None = task.fields.get("meter")
        return Text(self._read(meter) if meter else "", style="dim")


class TerminalProgress:
    """Progress as a live bar, with everything else printed above it. title: of what was begun last."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._meter: Meter | None = None
        self._bar: Progress | None = None
        self.title = ""

    def stage(self, title: str) -> None:
        self.title = title
        self._stop()
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._bar.add_task(title, total=None)
        self._bar.start()

    def start(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title = title
        self._stop()
        self._meter = Meter(title, total, unit, done, self._clock)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            _MeterColumn(Meter.counted),
            _MeterColumn(Meter.speed),
            _MeterColumn(Meter.left),
            _MeterColumn(Meter.commit_age),
            console=self._console,
        )
        self._bar.add_task(title, total=total, completed=done, meter=self._meter)
        self._bar.start()

    def advance(self, amount: int, **facts: int) -> None:
        if self._meter is not None and self._bar is not None:
            self._meter.advance(amount, facts)
            self._bar.update(self._bar.task_ids[0], completed=self._meter.done)

    def committed(self, number: int, seconds: float) -> None:
        if self._meter is not None:
            self._meter.commit_time = self._clock()

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    def finish(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._meter = None


@contextmanager
def reporting() -> Iterator[StageProgress]:
    """The right progress for standard error; its bar is taken down however the work ends."""
    console = Console(stderr=True)
    progress: TerminalProgress | PlainProgress
    if console.is_terminal:
        progress = TerminalProgress(console)
    else:
        progress = PlainProgress(lambda line: print(line, file=sys.stderr, flush=True))
    try:
        yield progress
    except OSError as error:
        if error.filename is None and progress.title:
            error.add_note(f"while {progress.title}")
        raise
    finally:
        progress.finish()
