"""The file of a lock: what it may be, and who holds it."""

import re
from pathlib import Path

from state.errors import InputError


def refuse_other_file(lock: Path) -> None:
    """Raise InputError where a lock's path has a link, or a file that is no lock of Holdfast."""
    if lock.is_symlink() or (lock.exists() and not re.fullmatch(rb"\d*\n?", _start(lock))):
        raise InputError(f"{lock} is in the way: it is no lock of Holdfast. Move it away.")


def _start(path: Path) -> bytes:
    """The first bytes of a file; of what is no file, bytes that no lock holds."""
    if not path.is_file():
        return b"no file"
    with path.open("rb") as file:
        return file.read(32)


def holder(lock: Path) -> str:
    """Who holds a lock, in words."""
    try:
        return f"process {int(lock.read_text())}"
    except (OSError, ValueError):
        return "another process"
