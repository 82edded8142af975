"""What the writer does with what recovery found: leftovers go, damage is set aside, and what can be is made
again.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from state.aside import SetAside
from state.damage import broken_objects, is_remade, lost_solutions, without_lost
from state.durable import Disk
from state.errors import InputError
from state.head import Head
from state.identity import digest
from state.objects import BrokenObject, empty_group, read_file
from state.paths import HEAD, HEADS, RECORD, RECORD_COPY, WRITTEN, ZARR, group_path
from state.recovery import Found, older_heads, retained
from state.remove import drop, finish_cut_short
from state.strays import strays
from state.writing import NAME

SHOWN = 5


@dataclass(frozen=True)
class Mended:
    """A run that can be gone on with.

    Attributes:
        heads: those that are kept, newest first.
        objects: what the next head names.
        solved_behind: see `Head`.
        damaged: whether anything was, so that a new head has to say what counts now.
        notes: what was found and done, in words.
        missing: objects that are named and still damaged: calibrate makes them again.
    """

    heads: list[Head]
    objects: dict[str, str]
    solved_behind: str | None
    damaged: bool
    notes: tuple[str, ...]
    missing: tuple[str, ...]


def mend(run: Path, found: Found, disk: Disk) -> Mended:
    """Make a run fit to be gone on with at the commit that was found. Holds the run's lock."""
    # A kill may have left HEAD visible but not durable; what is reported from here on must stay true.
    disk.sync([run / HEADS, run])
    readable = [*found.passed_over, found.recorded, *older_heads(run, disk, found.recorded.number)]
    finish_cut_short(run, readable, found.last_number, disk)
    older = older_heads(run, disk, found.recorded.number)
    heads = retained([found.recorded, *(head for head in older if head not in found.passed_over)])
    aside = SetAside(run, disk)
    objects, solved_behind = _with_carried(run, found, disk)
    _set_aside_damage(found, objects, heads, aside)
    mended = _restore(run, found.recorded, found.faults, aside)
    disk.sync([run])
    newer = [path for path in found.broken_heads if int(Path(path).stem) > found.recorded.number]
    found_strays = sorted(strays(run, heads, disk))
    if found.recorded.format == 1 or newer or found.broken_pointer:
        # Either kept no record of what it wrote, or a head that named it is lost: not provably ours, so not
        # deleted.
        for path in found_strays:
            if WRITTEN.fullmatch(path) or NAME.fullmatch(Path(path).name):
                aside.move(path)
    aside.sync()
    if f"{HEAD}.tmp" in found_strays and f"{HEAD}.tmp" not in aside.moved:
        raise InputError(
            f"{run / HEAD}.tmp is in the way: no record of Holdfast names it, so it is not removed. Move it "
            "elsewhere, then give the same command again."
        )
    older = [head for head in older_heads(run, disk, found.recorded.number) if head not in heads]
    drop(run, older, heads, disk)
    copied = _copy_record(run, found.recorded, disk)
    notes = list(found.notes)
    if aside.folder is not None:
        notes.append(f"{len(aside.moved) or 1} files are set aside in {run / aside.folder}; none was deleted")
    foreign = [path for path in found_strays if path not in aside.moved]
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        notes.append(f"left alone, as no commit names them: {', '.join(foreign[:SHOWN])}{more}")
    return Mended(
        heads=heads,
        objects=objects,
        solved_behind=solved_behind,
        damaged=bool(found.notes),
        notes=tuple(notes),
        missing=tuple(fault.path for fault in found.faults if fault.path in objects.keys() - mended - copied),
    )


def free_number(run: Path, wanted: int, disk: Disk) -> int:
    """The first number from `wanted` on that neither a head nor a generation nor anything else bears."""
    heads, groups = disk.list(run / HEADS), set(disk.list(run / ZARR))
    taken = {name.partition(".")[0] for name in heads} | {group.removeprefix("g") for group in groups}
    while f"{wanted:06d}" in taken:
        wanted += 1
    return wanted


def restore(run: Path, data: Mapping[str, bytes], objects: Mapping[str, str], disk: Disk) -> list[str]:
    """Write objects that were damaged again, where the bytes at hand are those that were committed.

    Returns what was restored.
    """
    aside, restored = SetAside(run, disk), []
    for path, content in data.items():
        if objects.get(path) != digest(content):
            continue
        try:
            read_file(run, path, digest(content), disk)
        except BrokenObject:
            aside.move(path)
            disk.put(run / path, content)
            restored.append(path)
    aside.sync()
    disk.sync(sorted({(run / path).parent for path in restored}))
    return restored


def _with_carried(run: Path, found: Found, disk: Disk) -> tuple[dict[str, str], str | None]:
    """The objects to go on with: where finished statistics are lost, with the solutions made behind them.

    They are good if the statistics come out the same when they are made again, which the commit that
    finishes them compares.
    """
    objects, behind = dict(found.head.objects), found.head.solved_behind
    for newer in found.passed_over[:1]:
        if newer.number < found.recorded.number or not newer.finished or found.head.finished:
            continue
        solutions = {
            path: seen for path, seen in newer.objects.items() if path.startswith(f"{ZARR}/solutions/")
        }
        of_them = newer.model_copy(update={"objects": solutions})
        faults = broken_objects(run, of_them, disk)
        whole = without_lost(of_them, faults).objects
        if whole.keys() - objects.keys():
            objects, behind = objects | whole, newer.statistics_digest
    return objects, behind


def _set_aside_damage(
    found: Found, objects: Mapping[str, str], heads: Collection[Head], aside: SetAside
) -> None:
    """Damaged heads, commits that were passed over, and solutions that are lost; all that nothing kept
    needs.
    """
    lost = set(lost_solutions(found.recorded, found.faults))
    kept = objects.keys() | {path for head in heads for path in head.objects if group_path(path) not in lost}
    passed = [path for head in found.passed_over for path in (*sorted(head.objects.keys() - kept), head.path)]
    solved = [path for path in sorted(found.recorded.objects) if group_path(path) in lost]
    aside.move_all([*found.broken_heads, *passed, *(path for path in solved if path not in objects)])
    if found.broken_pointer:
        aside.keep_copy(HEAD)


def _restore(run: Path, head: Head, faults: Collection[BrokenObject], aside: SetAside) -> set[str]:
    """Write again what is known without the damaged file; a head that HEAD alone holds too."""
    mended = set()
    if not (run / head.path).exists():
        aside.disk.put(run / head.path, head.encode())
        aside.disk.sync([run / HEADS])
    for path in (fault.path for fault in faults):
        data = None
        if path == RECORD:
            data = read_file(run, RECORD_COPY, head.objects[RECORD], aside.disk)
        elif is_remade(head, path):
            data = empty_group()
        if data is not None:
            aside.move(path)
            aside.disk.put(run / path, data)
            aside.disk.sync([(run / path).parent])
            mended.add(path)
    return mended


def _copy_record(run: Path, head: Head, disk: Disk) -> set[str]:
    """Put a whole copy of `run.json` beside the heads where there is none."""
    try:
        read_file(run, RECORD_COPY, head.objects[RECORD], disk)
    except BrokenObject:
        aside = SetAside(run, disk)
        aside.move(RECORD_COPY)
        disk.put(run / RECORD_COPY, read_file(run, RECORD, head.objects[RECORD], disk))
        aside.sync()
        disk.sync([run / HEADS])
    return {RECORD}
