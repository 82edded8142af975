"""What must be the same in the end, however a trial went: read from the disk without the program's reader."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.world import MINE, files_of

VARIES = re.compile(r"HEAD|heads/\d+\.json|events\.jsonl|\.lock|plans/.*|set-aside/.*")
"""Files of a run that hold times and numbers of commits, or that may be there or not."""


@dataclass(frozen=True)
class Content:
    """What a run or an export holds.

    Attributes:
        files: name → digest of each file that is promised; generation numbers aside.
        strays: names of all other files of ours.
        commits: the number of the newest commit; 0 for an export.
        objects: path in the trial → inode, of what must never be written twice.
    """

    files: dict[str, str]
    strays: frozenset[str] = frozenset()
    commits: int = 0
    objects: dict[str, int] = field(default_factory=dict)


def content(trial: Path, makes: str) -> Content | None:
    """What is at `trial/run` or `trial/out`; None where nothing is published there."""
    return run_content(trial) if makes == "run" else export_content(trial)


def run_content(trial: Path) -> Content | None:
    """The newest commit of a run, with the bytes that its files have."""
    run = trial / "run"
    head = newest_head(run)
    if head is None:
        return None
    numbered = [path for path in run.glob("heads/*.json") if path.stem.isdigit()]
    older = [one for one in map(_read_json, numbered) if one is not None]
    named = {path for one in (head, *older) for path in one["objects"]}
    files = {name: _digest(data) for name, data in files_of(run).items() if name in head["objects"]}
    generation = f"/{head['generation']}/"
    promised = {path.replace(generation, "/g/"): files.get(path, "missing") for path in head["objects"]}
    promised |= {"finished": str(head["finished"]), "cursor": str(head["cursor"])}
    strays = {name for name in files_of(run) if name not in named and not VARIES.fullmatch(name)}
    lasting = [path for path in head["objects"] if "/solutions/" in path or "/tokens/c" in path]
    kept = {f"run/{path}": (run / path).stat().st_ino for path in lasting if (run / path).exists()}
    return Content(promised, frozenset(name for name in strays if MINE not in name), head["number"], kept)


def newest_head(run: Path) -> dict[str, Any] | None:
    """The head that `HEAD` names, as JSON; None where there is none."""
    try:
        name = (run / "HEAD").read_text(encoding="utf-8").split()[0]
    except (OSError, ValueError, IndexError):
        return None
    return _read_json(run / name)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A head's content; None where it was torn, or is gone."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found


def export_content(trial: Path) -> Content | None:
    """All files of an export that has been published, and what else lies beside it."""
    files = {name: _digest(data) for name, data in files_of(trial / "out").items() if MINE not in name}
    if not files:
        return None
    beside = {
        name
        for name in files_of(trial)
        if name.split("/")[0] not in ("run", "out", ".out.lock") and MINE not in name
    }
    return Content(files, frozenset(beside))


def differing(expected: Content, found: Content) -> list[str]:
    """Names of files that are not the same in both."""
    names = expected.files.keys() | found.files.keys()
    return sorted(name for name in names if expected.files.get(name) != found.files.get(name))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
