"""What damage to a commit's files costs: all of it, one layer's solution, or nothing."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from state.durable import Disk
from state.head import Head
from state.identity import digest
from state.objects import SOLUTION, BrokenObject, empty_group, read_file, read_object
from state.paths import RECORD, RECORD_COPY, ZARR, group_path


def broken_objects(run: Path, head: Head, disk: Disk) -> list[BrokenObject]:
    """Every object of a commit that is missing or damaged.

    Raises:
        Unreadable: the device can't give one of them now.
    """
    faults = []
    for path, expected in head.objects.items():
        try:
            read_file(run, path, expected, disk)
        except BrokenObject as fault:
            faults.append(fault)
    return faults


def fatal(run: Path, head: Head, faults: Iterable[BrokenObject], disk: Disk) -> list[BrokenObject]:
    """Those of the faults without which nothing is left of the commit: in its statistics, or in a `run.json`
    whose copy is gone too.
    """
    return [fault for fault in faults if _is_fatal(run, head, fault.path, disk)]


def without_lost(head: Head, faults: Iterable[BrokenObject]) -> Head:
    """The commit without the solutions that are damaged."""
    lost = lost_solutions(head, faults)
    kept = {path: seen for path, seen in head.objects.items() if group_path(path) not in lost}
    return head if len(kept) == len(head.objects) else head.model_copy(update={"objects": kept})


def lost_solutions(head: Head, faults: Iterable[BrokenObject]) -> list[str]:
    """The groups `solutions/SOLVER/LAYER` in which something is damaged."""
    groups = {group_path(fault.path) for fault in faults if not is_remade(head, fault.path)}
    return sorted(group for group in groups if group.startswith("solutions/"))


def is_remade(head: Head, path: str) -> bool:
    """Whether an object's bytes are known without it: those of a group that only holds others."""
    return head.objects.get(path) == _empty_group_digest() and not SOLUTION.fullmatch(path)


def in_words(head: Head, faults: Sequence[BrokenObject]) -> list[str]:
    """A note for each thing that is damaged in a commit which goes on without it."""
    notes = []
    for group in lost_solutions(head, faults):
        first, *more = [fault for fault in faults if group_path(fault.path) == group]
        _, solver, layer = group.split("/")
        notes.append(
            f"{first}{f' and {len(more)} more files of it' if more else ''}: the solution of {solver} for "
            f"layer {layer} is lost, and nothing else; calibrating with its recipe makes it again"
        )
    for fault in faults:
        if fault.path == RECORD:
            notes.append(f"{fault}; its copy {RECORD_COPY} is whole, so nothing is lost")
        elif is_remade(head, fault.path):
            notes.append(f"{fault}; what it holds is known, so nothing is lost")
        elif fault.path.startswith(f"{ZARR}/tokens/"):
            notes.append(
                f"{fault}; export needs no tokens, and calibrating with the same data writes them again"
            )
    return notes


def in_few_words(faults: Sequence[BrokenObject], shown: int = 5) -> str:
    """The first few faults, and how many more there are."""
    more = f" and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(str(fault) for fault in faults[:shown]) + more


def _is_fatal(run: Path, head: Head, path: str, disk: Disk) -> bool:
    if path == RECORD:
        try:
            read_object(run, RECORD, head.objects[RECORD], disk)
        except BrokenObject:
            return True
        return False
    return path in head.statistics and not is_remade(head, path)


@cache
def _empty_group_digest() -> str:
    return digest(empty_group())
