"""Find the commit that counts, fall back where it is damaged, and delete what no commit names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.head import HEAD, HEADS, BrokenHead, Head, head_numbers, read_pointer
from state.objects import ZARR, BrokenObject, read_object

SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Found:
    """The newest whole commit of a run.

    Attributes:
        notes: what was damaged and passed over, in words for a person; empty if nothing was.
        last_number: the highest number that was ever published, as far as can be seen.
    """

    head: Head
    notes: tuple[str, ...]
    last_number: int


def published(run: Path, disk: Disk) -> bool:
    """Whether `run` has ever been created to the end. If not, what is there is worth nothing."""
    # Head 0 holds no work, so without HEAD it only shows that creation was cut short.
    return HEAD in disk.list(run) or any(number > 0 for number in head_numbers(disk.list(run / HEADS)))


def find_head(run: Path, disk: Disk, verify: bool) -> Found:
    """The head that HEAD names, or the newest one before it whose objects are whole.

    Args:
        verify: check every object's digest, not only the head's own. Heads fallen back to are always
            verified.

    Raises:
        InputError: not a run, or of a newer format.
        DamagedStore: no commit is whole.
    """
    if not published(run, disk):
        raise InputError(
            f"{run} is not a run, or its creation never ended: type `holdfast calibrate MODEL DATA {run}`"
        )
    while True:
        pointer = _read_head_file(run, disk)
        try:
            found = _choose(run, disk, verify, pointer)
        except DamagedStore:
            # A writer may have collected what HEAD named a moment ago.
            if _read_head_file(run, disk) == pointer:
                raise
        else:
            if not found.notes or _read_head_file(run, disk) == pointer:
                return found


def _read_head_file(run: Path, disk: Disk) -> bytes:
    try:
        return disk.read(run / HEAD)
    except OSError:
        return b""


def _choose(run: Path, disk: Disk, verify: bool, pointer: bytes) -> Found:
    notes: list[str] = []
    faulty: list[str] = []
    present = head_numbers(disk.list(run / HEADS))
    expected: str | None = None
    try:
        last, expected = read_pointer(pointer)
        candidates = [last, *(number for number in reversed(present) if number < last)]
    except BrokenHead:
        notes.append(f"{run / HEAD} is missing or damaged")
        last = max(present, default=0)
        candidates = present[::-1]

    for number in candidates:
        try:
            head = _load(run, disk, number, expected if number == last else None)
        except BrokenHead as error:
            notes.append(f"commit {number}: {HEADS}/{number:06d}.json {error}")
            faulty.append(f"{HEADS}/{number:06d}.json")
            continue
        faults = broken_objects(run, head, disk) if verify or notes else []
        if not faults:
            said = (*notes, f"fell back to commit {number}") if notes else ()
            return Found(head, said, last)
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        notes.append(f"commit {number}: " + "; ".join(str(fault) for fault in faults[:SHOWN_FAULTS]) + more)
        faulty += [fault.path for fault in faults]
    raise DamagedStore(
        f"{run} is damaged and no older commit is whole:\n  "
        + "\n  ".join(notes)
        + "\nRestore it from a copy, or calibrate into a new run: `holdfast calibrate MODEL DATA NEW_RUN`",
        faulty,
    )


def _load(run: Path, disk: Disk, number: int, expected: str | None) -> Head:
    try:
        head = Head.decode(disk.read(run / HEADS / f"{number:06d}.json"), run)
    except FileNotFoundError:
        raise BrokenHead("is missing") from None
    except OSError as error:
        raise BrokenHead(f"cannot be read ({error.strerror})") from error
    except BrokenHead as error:
        raise BrokenHead(f"is damaged ({error})") from error
    if head.number != number or expected not in (None, head.digest):
        raise BrokenHead("is not the commit that HEAD names")
    return head


def broken_objects(run: Path, head: Head, disk: Disk) -> list[BrokenObject]:
    """Every object of a commit that is missing or damaged."""
    faults = []
    for path, expected in head.objects.items():
        try:
            read_object(run, path, expected, disk)
        except BrokenObject as fault:
            faults.append(fault)
    return faults


def retained(heads: Sequence[Head]) -> list[Head]:
    """Which of `heads`, newest first, are kept: the newest, and the newest of the generation before it."""
    older = [head for head in heads if head.generation != heads[0].generation]
    return [heads[0], *older[:1]]


def older_heads(run: Path, disk: Disk, before: int) -> list[Head]:
    """Readable heads with lower numbers, newest first."""
    heads = []
    for number in reversed(head_numbers(disk.list(run / HEADS))):
        if number < before:
            try:
                heads.append(_load(run, disk, number, None))
            except BrokenHead:
                continue
    return heads


def collect(run: Path, keep: Sequence[Head], disk: Disk) -> None:
    """Delete every head but those of `keep`, then every object that none of them names."""
    disk.delete(run / f"{HEAD}.tmp")
    heads = {head.path for head in keep}
    _prune(run, HEADS, heads, disk)
    _prune(run, ZARR, {path for head in keep for path in head.objects}, disk)


def _prune(run: Path, folder: str, named: set[str], disk: Disk) -> None:
    parents = {str(parent) for path in named for parent in Path(path).parents}
    for name in disk.list(run / folder):
        path = f"{folder}/{name}"
        if path in parents:
            _prune(run, path, {one for one in named if one.startswith(f"{path}/")}, disk)
        elif path not in named:
            disk.delete(run / path)
