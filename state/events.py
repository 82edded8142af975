"""The log of a run: `events.jsonl`, what happened when. Not synced: a power cut may take its last lines."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from state.durable import Disk
from state.paths import EVENTS


def read_events(run: Path, disk: Disk) -> list[dict[str, Any]]:
    """The lines of the log; one cut short by a crash is left out."""
    try:
        lines = disk.read(run / EVENTS).splitlines()
    except OSError:  # there is none, or it is lost; of one that can't be read now Disk says so
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events


def newest_commit(events: Iterable[Mapping[str, Any]]) -> int | None:
    """The highest number of a commit that the log knows."""
    numbers = [event["number"] for event in events if isinstance(event.get("number"), int)]
    return max(numbers, default=None)
