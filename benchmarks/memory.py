"""Anonymous resident memory of a process, watched from outside (Linux).

Pages mapped from files do not count: the system drops them whenever it needs room.
"""

import threading
from pathlib import Path

PERIOD = 0.003  # seconds between two samples


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Samples a process from its making until `finish`; `peak` is the largest sample in bytes."""

    def __init__(self, process: int) -> None:
        self.process, self.peak = process, 0
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def finish(self) -> int:
        """End sampling and give the peak."""
        self._finished.set()
        self._thread.join()
        return self.peak

    def _sample(self) -> None:
        while not self._finished.wait(PERIOD):
            self.peak = max(self.peak, anonymous_bytes(self.process))
