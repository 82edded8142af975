"""Does pieces of work in forks, several at a time, and hands their results on as they come."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.crash.server import POLL, start

Piece = Callable[[], dict[str, Any]]
"""Work that is done in a fork; what it returns must be JSON."""


def results(
    pieces: Sequence[Piece], folder: Path, jobs: int, until: float = float("inf")
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the result of every piece begun before the time `until` (of the monotonic clock).

    A piece that fails gives `{"failed": what it said}`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[int, int] = {}
    waiting = iter(range(len(pieces)))
    more = True
    while running or more:
        while more and len(running) < jobs:
            number = next(waiting, None)
            if number is None or time.monotonic() > until:
                more = False
            else:
                running[_begin(pieces[number], folder, number)] = number
        ended, _ = os.waitpid(-1, os.WNOHANG) if running else (0, 0)
        if ended in running:
            number = running.pop(ended)
            yield number, _result(folder, number)
        else:
            time.sleep(POLL)


def _begin(piece: Piece, folder: Path, number: int) -> int:
    def work() -> int:
        (folder / f"{number}.json").write_text(json.dumps(piece()), encoding="utf-8")
        return 0

    return start(work, folder / f"{number}.log")


def _result(folder: Path, number: int) -> dict[str, Any]:
    written, log = folder / f"{number}.json", folder / f"{number}.log"
    try:
        found: dict[str, Any] = json.loads(written.read_bytes())
    except (OSError, ValueError):
        found = {"failed": log.read_text(encoding="utf-8", errors="replace")[-1000:]}
    written.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return found
