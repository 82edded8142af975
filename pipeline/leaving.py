"""Ends the process in time after a signal, also where the main thread is stuck or a library held it up.

A thread of its own hears of signals through a pipe that the interpreter writes to at once, whatever the main
thread is doing. The main thread ends by itself as a rule; only when it does not is the process cut off, which
costs no more than a crash does.
"""

import os
import select
import signal
import sys
import threading
import time

from stages.calibrate.signals import StopRequest

PATIENCE = 15.0
"""Seconds that the main thread has to end where it has nothing to save; its promise is 20."""

SAME = 1.0
"""Signals within this time are one request: a terminal that closes sends several."""

LOOK_EVERY = 0.1

STOPPED = 75


def leave_in_time(stop: StopRequest) -> None:
    """Start to watch over the end of this process. Call it once, in the main thread, before anything slow."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, stop), name="leaving", daemon=True).start()


def _watch(heard: int, stop: StopRequest) -> None:
    number = os.read(heard, 1)[0]
    name = signal.Signals(number).name
    first = stuck_since = time.monotonic()
    insisted = False
    while True:
        if select.select([heard], [], [], LOOK_EVERY)[0]:
            os.read(heard, 1)
            insisted = insisted or time.monotonic() - first > SAME
        if stop.manner == "wait":
            stuck_since = time.monotonic()
        if (insisted or time.monotonic() - stuck_since > PATIENCE) and not stop.saving():
            _leave(name, quietly=stop.manner == "end")


def _leave(name: str, quietly: bool) -> None:
    if not quietly:
        shown_again = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live bar hides the cursor
        what = f"stopped by {name} at once. What was committed is safe; the same command goes on from there."
        sys.stderr.write(f"{shown_again}holdfast: {what}\n")
    os._exit(STOPPED)
