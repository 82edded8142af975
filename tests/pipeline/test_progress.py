"""What is shown while a stage works, with a clock that the tests turn."""

import io

import pytest
from rich.console import Console

from pipeline.progress import Meter, PlainProgress, TerminalProgress, duration, quantity


class Clock:
    """Seconds, as set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (187, "3:07 min"),
        (3600, "1:00:00 h"),
        (8640, "2:24:00 h"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("amount", "unit", "shown"),
    [
        (16384, "tokens", "16,384 tokens"),
        (999, "bytes", "999 B"),
        (1_500, "bytes", "1.5 kB"),
        (34_962_448, "bytes", "35.0 MB"),
        (47e9, "bytes", "47.0 GB"),
    ],
)
def test_quantity(amount: float, unit: str, shown: str) -> None:
    assert quantity(amount, unit) == shown


def test_speed_and_time_left_count_only_what_this_process_did() -> None:
    clock = Clock()
    meter = Meter("calibrating", total=10, unit="batches", done=6, clock=clock)
    assert meter.line() == "calibrating: 6/10 batches (60%)"
    clock.now = 20.0
    meter.advance(1, {"tokens": 4096})
    meter.advance(1, {"tokens": 4096})
    assert meter.line() == "calibrating: 8/10 batches (80%), 410 tokens/s, 20 s left"
    meter.commit_time = 5.0
    assert meter.line() == "calibrating: 8/10 batches (80%), 410 tokens/s, 20 s left, last commit 15 s ago"


def test_without_tokens_the_unit_gives_the_speed() -> None:
    clock = Clock()
    meter = Meter("writing", total=6_000_000, unit="bytes", done=0, clock=clock)
    clock.now = 2.0
    meter.advance(3_000_000, {})
    assert meter.line() == "writing: 3.0 MB of 6.0 MB (50%), 1.5 MB/s, 2 s left"


def test_plain_lines_come_every_ten_seconds_and_at_commits() -> None:
    clock, lines = Clock(), []
    progress = PlainProgress(lines.append, clock)
    progress.stage("planning")
    progress.start("calibrating", 4, "batches")
    for second in (4, 9, 12, 13):
        clock.now = second
        progress.advance(1, tokens=100)
        if second == 9:
            progress.committed(1, 0.5)
    progress.note("a note")
    progress.warn("too little text")
    progress.finish()
    assert lines == [
        "planning",
        "commit 1, written in 0.50 s",
        "calibrating: 3/4 batches (75%), 25 tokens/s, 4 s left, last commit 3 s ago",
        "a note",
        "warning: too little text",
        "calibrating: 4/4 batches (100%), 31 tokens/s, last commit 4 s ago",
    ]


def test_plain_progress_tells_what_earlier_processes_did() -> None:
    lines: list[str] = []
    PlainProgress(lines.append, Clock()).start("calibrating", 64, "batches", done=18)
    assert lines == ["going on at 18/64 batches"]


def test_plain_progress_outside_a_bar_says_what_it_can() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append, Clock())
    progress.advance(1)
    progress.committed(3, 0.25)
    progress.finish()
    assert lines == ["commit 3, written in 0.25 s"]


def test_the_terminal_shows_bar_speed_and_commit_age() -> None:
    clock = Clock()
    screen = io.StringIO()
    progress = TerminalProgress(
        Console(file=screen, force_terminal=True, width=140, color_system=None), clock
    )
    progress.stage("planning [not markup]")
    progress.start("calibrating", 4, "batches", done=1)
    clock.now = 10.0
    progress.advance(1, tokens=1000)
    progress.committed(1, 0.5)
    clock.now = 12.0
    progress.warn("look [here]")
    progress.finish()
    shown = screen.getvalue()
    assert "warning: look [here]" in shown
    assert "2/4 batches" in shown
    assert "last commit 2 s ago" in shown
