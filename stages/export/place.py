"""Where an export is made: the real place of OUT, whether it can be one, and the names beside it."""

import os
from dataclasses import dataclass
from pathlib import Path

from stages.export.ownership import is_folder
from state.errors import InputError


@dataclass(frozen=True)
class Place:
    """The folder OUT and what lies beside it.

    partial: where the export is built. new: where `partial` is made, with its records, before it gets
    its name.
    lock: the lock file; the same one however OUT is reached.
    """

    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def new(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def lock(self) -> Path:
        return self.out.with_name(f".{self.out.name}.lock")


def find_place(out: Path) -> Place:
    """The place of OUT; of a link, the place of the folder that it leads to.

    Raises:
        InputError: no folder can be made there, or what lies beside it can't be one of ours.
    """
    place = Place(_behind_links(out))
    _refuse_impossible(place.out)
    for beside in (place.partial, place.new):
        if os.path.lexists(beside) and not is_folder(beside):
            raise InputError(f"{beside} is in the way: it is no folder. Move it away, or choose another OUT.")
    return place


def _behind_links(out: Path) -> Path:
    if not out.is_symlink():
        return out
    try:
        return out.resolve(strict=True)
    except FileNotFoundError:
        target = os.path.realpath(out)
        raise InputError(
            f"{out} is a link to {target}, which does not exist; make that folder (mkdir -p {target}), or "
            "remove the link"
        ) from None
    except (OSError, RuntimeError):
        raise InputError(f"{out} is a link that leads nowhere; remove it, or choose another OUT") from None


def _refuse_impossible(out: Path) -> None:
    if out.name in ("", ".."):
        raise InputError(f"{out} is no name for a folder to be made; choose another OUT")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; OUT must be a folder to be made")
    if out.is_mount():
        raise InputError(
            f"{out} is a mount point, which nothing can be renamed to; choose a folder inside it"
        )
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a folder, so {out} can't be made; choose another OUT")
