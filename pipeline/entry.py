"""Where `holdfast` begins: signals are watched before anything slow is imported, so that none is lost."""

import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from pipeline.leaving import STOPPED, leave_in_time
from stages.calibrate.signals import Interrupted, watch_signals


def main() -> None:
    """Entry point of `holdfast` and `python -m holdfast`."""
    stop = watch_signals()
    leave_in_time(stop)
    sys.stdout, sys.stderr = outliving(sys.stdout, BrokenPipeError), outliving(sys.stderr, OSError)
    try:
        from pipeline.cli import app

        app()
    except Interrupted as error:
        print(f"holdfast: stopped by {error}; give the same command again", file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        stop.end()


def outliving(stream: TextIO | None, forgiven: type[OSError]) -> TextIO:
    """A stream like this one that takes what is written also when nobody is there to read it any more.

    A terminal that is closed must not cost the work that is told about on it.

    Args:
        stream: of a file descriptor; None where there was none from the start.
        forgiven: what a write may fail with.
    """
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    raw = _Outliving(stream.fileno(), forgiven)
    # As with `python -u`: what failed to be written is not kept, to fail again at exit.
    return io.TextIOWrapper(
        raw,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
        write_through=True,
    )


class _Outliving(io.FileIO):
    def __init__(self, descriptor: int, forgiven: type[OSError]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._forgiven = forgiven

    def write(self, data: Any) -> int:
        """Write all of it, or forgive."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[super().write(rest) or 0 :]
        except self._forgiven:
            pass
        return len(data)
