"""Names of a run's files as records give them: checked before anything is read, written or removed by them.

A record may come from elsewhere, with the folder that it lies in. A name in it leads to a file of ours
inside the run, or the record is refused.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from state.errors import InputError

ZARR = "calibration.zarr"
HEAD = "HEAD"
HEADS = "heads"
RECORD = "run.json"
RECORD_COPY = f"{HEADS}/{RECORD}"
EVENTS = "events.jsonl"
LOCK = ".lock"
SET_ASIDE = "set-aside"

GENERATION = re.compile(r"g\d{6,}")
_PART = r"(?!\.{1,2}/)[^/\\\x00-\x1f]+"
_IN_ZARR = rf"(?:(?:tokens|{GENERATION.pattern}|solutions)/(?:{_PART}/)*)?(?:zarr\.json|c(?:\.\d+)*)"
OBJECT = re.compile(rf"{re.escape(RECORD)}|{re.escape(ZARR)}/{_IN_ZARR}")
"""An object of a commit."""

WRITTEN = re.compile(rf"{HEAD}\.tmp|{RECORD_COPY}|{HEADS}/\d{{6,}}\.json|{OBJECT.pattern}")
"""Whatever a commit writes but HEAD, which it replaces."""


def head_path(number: int) -> str:
    """Of a head's file."""
    return f"{HEADS}/{number:06d}.json"


def group_path(path: str) -> str:
    """`g000012` of a path inside a generation, `solutions/SOLVER/LAYER` of one inside a solution; else ""."""
    parts = path.split("/")
    if parts[0] != ZARR:
        return ""
    if GENERATION.fullmatch(parts[1]):
        return parts[1]
    return "/".join(parts[1:4]) if parts[1] == "solutions" and len(parts) > 4 else ""


def refuse_links(run: Path, paths: Iterable[str]) -> None:
    """Raise InputError where a folder on the way from the run to one of the paths is a symbolic link.

    The run itself may be one: what it leads to is its real path.
    """
    folders = {parent for path in paths for parent in Path(path).parents} - {Path()}
    for folder in sorted(folders):
        if (run / folder).is_symlink():
            raise InputError(
                f"{run / folder} is a symbolic link. A run is written and tidied up inside its own folder "
                "alone: put there what the link leads to, then give the same command again."
            )
