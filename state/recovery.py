"""Find the commit that counts, and the one to fall back to where it is damaged. Reads alone; changes
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from state.damage import broken_objects, fatal, in_few_words, in_words, without_lost
from state.durable import Disk
from state.errors import DamagedStore, InputError
from state.head import BrokenHead, Head, Pointer, head_numbers, read_pointer
from state.objects import BrokenObject
from state.paths import HEAD, HEADS, RECORD, RECORD_COPY, ZARR, head_path


@dataclass(frozen=True)
class Found:
    """The newest whole commit of a run.

    Attributes:
        head: the commit, without solutions that are damaged.
        recorded: the same as it was written.
        notes: what was damaged or passed over, in words for a person; empty if nothing was.
        last_number: the highest number that was ever published, as far as can be seen.
        faults: objects of `recorded` that are damaged, and that it can do without.
        passed_over: newer commits whose statistics are damaged.
        broken_heads: names of heads' files that are damaged.
        broken_pointer: HEAD is missing or damaged.
    """

    head: Head
    recorded: Head
    notes: tuple[str, ...]
    last_number: int
    faults: tuple[BrokenObject, ...] = ()
    passed_over: tuple[Head, ...] = ()
    broken_heads: tuple[str, ...] = ()
    broken_pointer: bool = False


def published(run: Path, disk: Disk) -> bool:
    """Whether `run` has ever been created to the end, as far as HEAD and heads tell."""
    if HEAD in disk.list(run):
        return True
    names = disk.list(run / HEADS)
    numbers = head_numbers(names)
    # A head 0 beside the record of its writing only shows that creation was cut short.
    return any(number > 0 for number in numbers) or (bool(numbers) and "000000.writing" not in names)


def refuse_lost_heads(run: Path, disk: Disk) -> None:
    """Raise DamagedStore where a run's content is there, and neither HEAD nor a head says what counts of
    it.
    """
    names, heads = disk.list(run), disk.list(run / HEADS)
    if published(run, disk) or "000000.writing" in heads or "zarr.json" not in disk.list(run / ZARR):
        return
    if RECORD in names or RECORD_COPY.rpartition("/")[2] in heads:
        raise DamagedStore(
            f"{run} holds a run, but HEAD and all heads are lost, which say what counts of it. Nothing was "
            f"touched: `holdfast repair {run}` looks for whole statistics.",
            [HEAD],
        )


def find_head(run: Path, disk: Disk, verify: bool) -> Found:
    """The head that HEAD names, or the newest one before it whose statistics are whole.

    Args:
        verify: check every object's digest, and every head, not only the head's own. Heads fallen back to are
            always verified.

    Raises:
        InputError: not a run, or of a newer format.
        Unreadable: the device can't give a file now; nothing can be said of it.
        DamagedStore: no commit is whole, or all heads are lost.
    """
    if not published(run, disk):
        refuse_lost_heads(run, disk)
        raise InputError(
            f"{run} is not a run, or its creation never ended: type `holdfast calibrate MODEL DATA {run}`"
        )
    while True:
        pointer = read_head_file(run, disk)
        try:
            found = _choose(run, disk, verify, pointer)
        except DamagedStore:
            # A writer may have collected what HEAD named a moment ago.
            if read_head_file(run, disk) == pointer:
                raise
        else:
            if not found.notes or read_head_file(run, disk) == pointer:
                return found


def read_head_file(run: Path, disk: Disk) -> bytes | None:
    """The bytes of HEAD; None where there is no such file."""
    try:
        return disk.read(run / HEAD)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _choose(run: Path, disk: Disk, verify: bool, data: bytes | None) -> Found:
    notes: list[str] = []
    broken_heads: list[str] = []
    faulty: list[str] = []
    passed_over: list[Head] = []
    pointer = read_pointer(data, run)
    broken_pointer = pointer.fault is not None
    if broken_pointer:
        notes.append(f"{run / HEAD} {pointer.fault}")
    present = head_numbers(disk.list(run / HEADS))
    last = pointer.number if pointer.number is not None else max(present, default=0)
    for number in sorted({last, *(number for number in present if number < last)}, reverse=True):
        known = pointer if number == last else Pointer()
        head, fault = _read_head(run, disk, number, known, verify or bool(notes))
        if fault and not (head is None and number != last and "is missing" in fault):
            notes.append(f"commit {number}: {head_path(number)} {fault}")
            broken_heads.append(head_path(number))
        if head is None:
            continue
        if number == last and pointer.head is None and not pointer.fault and head.format > 1:
            broken_pointer = True
            notes.append(f"{run / HEAD} is damaged")
        faults = broken_objects(run, head, disk) if verify or notes else []
        if deadly := fatal(run, head, faults, disk):
            notes.append(f"commit {number}: {in_few_words(deadly)}")
            faulty += [one.path for one in faults]
            passed_over.append(head)
            continue
        if passed_over or (broken_heads and number != last):
            notes.append(f"fell back to commit {number}")
        notes += in_words(head, faults)
        if verify:
            older = [one for one in present if one < number]
            broken_older = _broken_heads(run, disk, older)
            notes += [
                f"the older commit {one}: {head_path(one)} {why}; nothing newer needs it"
                for one, why in broken_older
            ]
            broken_heads += [head_path(one) for one, _ in broken_older]
        return Found(
            head=without_lost(head, faults),
            recorded=head,
            notes=tuple(notes),
            last_number=last,
            faults=tuple(faults),
            passed_over=tuple(passed_over),
            broken_heads=tuple(broken_heads),
            broken_pointer=broken_pointer,
        )
    raise DamagedStore(
        f"{run} is damaged and no older commit is whole:\n  "
        + "\n  ".join(notes)
        + f"\n`holdfast check {run}` names all that is damaged, and `holdfast repair {run}` looks for what "
        "is whole. "
        "Or restore it from a copy, or calibrate into a new run: `holdfast calibrate MODEL DATA NEW_RUN`",
        [*broken_heads, *faulty],
    )


def _read_head(
    run: Path, disk: Disk, number: int, pointer: Pointer, verify: bool
) -> tuple[Head | None, str | None]:
    """A head, from HEAD or from its own file, and what is wrong with the latter if that was looked at."""
    if pointer.head is not None and not verify:
        return pointer.head, None
    try:
        return load_head(run, disk, number, pointer.digest), None
    except BrokenHead as fault:
        if pointer.head is not None:
            return pointer.head, f"{fault}; HEAD holds the same, so nothing is lost"
        return None, str(fault)


def _broken_heads(run: Path, disk: Disk, numbers: Sequence[int]) -> list[tuple[int, str]]:
    """Number and fault of each damaged head. One that is gone by now was collected meanwhile."""
    broken = []
    for number in reversed(numbers):
        try:
            load_head(run, disk, number, None)
        except BrokenHead as fault:
            if str(fault) != "is missing":
                broken.append((number, str(fault)))
    return broken


def load_head(run: Path, disk: Disk, number: int, expected: str | None) -> Head:
    """A head from its own file.

    Args:
        expected: its digest, where HEAD tells.

    Raises:
        BrokenHead: missing, damaged or another one.
    """
    try:
        head = Head.decode(disk.read(run / head_path(number)), run)
    except FileNotFoundError:
        raise BrokenHead("is missing") from None
    except OSError as error:
        raise BrokenHead(f"cannot be read ({error.strerror})") from error
    except BrokenHead as error:
        raise BrokenHead(f"is damaged ({error})") from error
    if head.number != number or expected not in (None, head.digest):
        raise BrokenHead("is not the commit that HEAD names")
    return head


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
                heads.append(load_head(run, disk, number, None))
            except BrokenHead:
                continue
    return heads
