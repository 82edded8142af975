"""Where OUT stands before a command begins: absent, the wanted export, another to replace, or not ours."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.export.ownership import is_intact
from stages.export.place import Place
from stages.export.records import (
    IDENTITY,
    JOURNAL,
    MARK,
    RECORDS,
    REPORT,
    Mark,
    Written,
    decode_identity,
    decode_journal,
    decode_mark,
    encode_identity,
    missing_record,
    read_record,
    shown,
    written,
)
from state.durable import Disk
from state.errors import DamagedStore, Difference, IdentityMismatch, InputError


@dataclass(frozen=True)
class Wanted:
    """The export to be made.

    identity: what it is made from. files: the names of all its files. recipe: the recipe's name, for people;
    the identity holds the digest of what it says.
    """

    identity: Mapping[str, str]
    files: Collection[str]
    recipe: str | None = None


@dataclass(frozen=True)
class Standing:
    """What is at OUT.

    mark: of an unfinished folder. journal: of the wanted export, whole and intact; None otherwise. replaced:
    of what is to be replaced, the files that may be deleted.
    """

    mark: Mark | None = None
    journal: Mapping[str, Written] | None = None
    replaced: tuple[Written, ...] = ()

    @property
    def exchanging(self) -> bool:
        """Whether a command ended while it put a new export in the place of an older one."""
        return self.mark is not None and self.mark.exchange is not None


def examine(disk: Disk, out: Path, wanted: Wanted, overwrite: bool) -> Standing:
    """Find out what is at OUT; changes nothing.

    Raises:
        InputError: OUT is not Holdfast's, or can't be read now.
        IdentityMismatch: OUT is another export, and `overwrite` is off.
        DamagedStore: OUT's journal is damaged or missing; or OUT is damaged, and `overwrite` is off.
    """
    if not disk.list(out):
        return Standing()
    mark = _mark_of(disk, out)
    if mark is not None and mark.exchange is not None:
        return Standing(mark, _exchanged(disk, out, wanted), mark.exchange)
    return _examine_whole(disk, out, wanted, overwrite, mark)


def refuse_known(disk: Disk, place: Place, wanted: Wanted, overwrite: bool) -> None:
    """Refuse what is at OUT or OUT.partial while only a part of the wanted identity is known, and no file's
    name. Reads records alone, and changes nothing.

    Raises InputError, IdentityMismatch and DamagedStore as making the export would.
    """
    for folder in (place.out, place.partial):
        if not disk.list(folder):
            continue
        if folder == place.partial:
            journal = unfinished_journal(disk, place)
        else:
            mark = _mark_of(disk, folder)
            if mark is not None and mark.exchange is not None:
                continue
            journal = _whole_journal(disk, folder)
        if overwrite or journal is None:
            continue
        stored = read_identity(disk, folder, journal, f"move {folder} away, then give the same command again")
        known = {field: stored[field] for field in wanted.identity if field in stored}
        if known != wanted.identity:
            raise mismatch(disk, folder, known, wanted)


def unfinished_journal(disk: Disk, place: Place) -> dict[str, Written] | None:
    """The journal of OUT.partial; None where a kill left no more than the mark while it was removed.

    Raises:
        InputError: it is not Holdfast's. DamagedStore: a record of it is damaged.
    """
    remedy = f"move {place.partial} away, then give the same command again"
    mark = read_record(disk, place.partial / MARK, decode_mark, remedy)
    if mark is None or mark.out != place.out.name:
        raise InputError(
            f"{place.partial} exists and is not Holdfast's unfinished export to {place.out.name}; move it "
            "away, or choose another OUT"
        )
    return read_record(disk, place.partial / JOURNAL, decode_journal, remedy)


def _mark_of(disk: Disk, out: Path) -> Mark | None:
    """The mark of a folder that holds something. Raises InputError unless it is ours, and to become OUT."""
    if not RECORDS & set(disk.list(out)):
        raise InputError(f"{out} exists and is no export of Holdfast; choose another OUT, or move it away")
    mark = read_record(disk, out / MARK, decode_mark, f"move {out} away, or choose another OUT")
    if mark is not None and mark.out != out.name:
        raise InputError(
            f"{out} is an unfinished export to a folder named {mark.out}; rename it back to "
            f"{mark.out}.partial and export there, or choose another OUT"
        )
    return mark


def _whole_journal(disk: Disk, out: Path) -> dict[str, Written]:
    """The journal of OUT where nothing is exchanged. Raises DamagedStore where it is missing or damaged."""
    lost = f"without it nothing tells which files Holdfast wrote: move {out} away, or choose another OUT"
    journal = read_record(disk, out / JOURNAL, decode_journal, lost)
    if journal is None:
        raise missing_record(out / JOURNAL, lost)
    return journal


def read_identity(disk: Disk, folder: Path, journal: Mapping[str, Written], remedy: str) -> dict[str, str]:
    """The identity of a folder.

    Raises:
        DamagedStore: it is missing or not what was written. Journals of earlier versions do not name it.
    """
    stored = read_record(disk, folder / IDENTITY, decode_identity, remedy)
    if stored is None:
        raise missing_record(folder / IDENTITY, remedy)
    if journal.get(IDENTITY) not in (None, written(IDENTITY, encode_identity(stored))):
        raise DamagedStore(
            f"{folder / IDENTITY} is damaged: its bytes are not those that Holdfast wrote; {remedy}",
            [IDENTITY],
        )
    return stored


def mismatch(disk: Disk, folder: Path, stored: Mapping[str, str], wanted: Wanted) -> IdentityMismatch:
    """The error for a folder that holds another export: every differing field."""
    current = wanted.identity
    found = [
        Difference(field, stored.get(field), current.get(field))
        for field in sorted(stored.keys() | current.keys())
        if stored.get(field) != current.get(field)
    ]
    lines = [f"{folder} is another export; {len(found)} field(s) differ:"]
    for difference in found:
        if difference.field == "recipe":
            difference = _with_names(disk, folder, difference, wanted.recipe)
        lines.append(f"  {difference}")
    lines.append("choose another OUT, or replace it with --overwrite (files that are not Holdfast's stay)")
    return IdentityMismatch("\n".join(lines), found)


def _examine_whole(disk: Disk, out: Path, wanted: Wanted, overwrite: bool, mark: Mark | None) -> Standing:
    """OUT without a mark, or with that of a folder that was renamed in one piece."""
    journal = _whole_journal(disk, out)
    replaced = Standing(mark, None, tuple(journal.values()))
    try:
        stored = read_identity(disk, out, journal, "give the command again with --overwrite")
    except DamagedStore:
        if overwrite:
            return replaced
        raise
    if stored != wanted.identity:
        if overwrite:
            return replaced
        raise mismatch(disk, out, stored, wanted)
    damaged = damaged_files(out, journal, wanted.files)
    if not damaged:
        return Standing(mark, journal)
    if overwrite:
        return replaced
    raise DamagedStore(
        f"{out} is this export, but {shown(damaged)} is missing or damaged; give the command again with "
        "--overwrite",
        damaged,
    )


def damaged_files(out: Path, journal: Mapping[str, Written], files: Collection[str]) -> list[str]:
    """What is missing or has other bytes; the journal itself if it names other files than the export has."""
    damaged = [name for name, entry in journal.items() if not is_intact(out, entry)]
    if journal.keys() - {IDENTITY} != set(files):
        damaged.append(JOURNAL)
    return damaged


def _exchanged(disk: Disk, out: Path, wanted: Wanted) -> dict[str, Written] | None:
    """The journal, if all that is left of an exchange is to remove the mark."""
    try:
        journal = read_record(disk, out / JOURNAL, decode_journal, "")
        if journal is None or read_identity(disk, out, journal, "") != wanted.identity:
            return None
    except DamagedStore:  # the records are removed and come anew
        return None
    return None if damaged_files(out, journal, wanted.files) else journal


def _with_names(disk: Disk, folder: Path, recipes: Difference, current: str | None) -> Difference:
    """The digests of two recipes, with the recipes' names where they are known."""
    try:
        stored = json.loads(disk.read(folder / REPORT)).get("recipe")
    except (OSError, ValueError, AttributeError, RecursionError):
        stored = None
    return Difference(recipes.field, _named(stored, recipes.stored), _named(current, recipes.current))


def _named(name: object, content: str | None) -> str | None:
    return f"{name} ({content})" if name and content else content
