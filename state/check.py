"""Verify everything a run consists of, and say what of it is whole. Reads alone; locks and changes
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from state.damage import fatal, in_words
from state.durable import Disk
from state.errors import Unreadable
from state.head import BrokenHead, Head, head_numbers, read_pointer
from state.objects import BrokenObject, read_file
from state.paths import HEAD, HEADS, RECORD, RECORD_COPY, head_path
from state.recovery import find_head, load_head, published, read_head_file
from state.strays import strays


@dataclass(frozen=True)
class Checked:
    """A run as it was found.

    Attributes:
        newest: the newest commit whose head can be read; None if there is none.
        files: how many were verified.
        damaged: path → what is wrong with it, in words.
        unreadable: path → why it can't be read now, in words.
        costs: what the damage costs, in words.
        foreign: files among the run's that no commit names.
    """

    newest: Head | None
    files: int
    damaged: Mapping[str, str]
    unreadable: Mapping[str, str]
    costs: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether everything was read and is as it was written."""
        return not self.damaged and not self.unreadable


def check_run(run: Path, disk: Disk) -> Checked:
    """Read every file of every commit that is kept.

    Raises:
        InputError: not a run, or of a newer format.
        DamagedStore: HEAD and all heads are lost, or a head names files outside of the run.
    """
    while True:
        if not published(run, disk):
            find_head(run, disk, verify=False)  # says what is there instead
        before = read_head_file(run, disk)
        checked = _Look(run, disk).at(before)
        # A writer may have collected what was just looked at.
        if checked.whole or read_head_file(run, disk) == before:
            return checked


@dataclass
class _Look:
    run: Path
    disk: Disk
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    faults: list[BrokenObject] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)

    def at(self, data: bytes | None) -> Checked:
        heads = self._heads(data)
        newest = heads[0] if heads else None
        for head in heads:
            # What an older commit names beside its statistics the newest does too, or it was lost before.
            for path, expected in (head.objects if head is newest else head.statistics).items():
                self._verify(path, expected)
        costs: list[str] = []
        if newest is not None:
            if newest.format > 1:
                self._verify(RECORD_COPY, newest.objects[RECORD])
            own = [fault for fault in self.faults if fault.path in newest.objects]
            if fatal(self.run, newest, own, self.disk):
                costs.append(
                    f"statistics of commit {newest.number} are lost: calibrating goes on from an older one"
                )
            costs += in_words(newest, own)
        return Checked(
            newest,
            len(self.seen) + len(heads) + 1,
            self.damaged,
            self.unreadable,
            tuple(costs),
            tuple(sorted(strays(self.run, heads, self.disk))),
        )

    def _heads(self, data: bytes | None) -> list[Head]:
        pointer = read_pointer(data, self.run)
        if pointer.fault:
            self.damaged[HEAD] = f"{HEAD} {pointer.fault}"
        present = head_numbers(self.disk.list(self.run / HEADS))
        last = pointer.number if pointer.number is not None else max(present, default=0)
        heads = []
        for number in sorted({last, *(one for one in present if one < last)}, reverse=True):
            head = pointer.head if number == last else None
            try:
                expected = pointer.digest if number == last else None
                head = load_head(self.run, self.disk, number, expected)
            except BrokenHead as fault:
                self.damaged[head_path(number)] = f"{head_path(number)} {fault}"
            except Unreadable as error:
                self.unreadable[head_path(number)] = f"{head_path(number)} can't be read now: {error.reason}"
            if head is not None:
                heads.append(head)
        without_copy = pointer.head is None and not pointer.fault
        if without_copy and heads and heads[0].number == last and heads[0].format > 1:
            self.damaged[HEAD] = f"{HEAD} is damaged"
        return heads

    def _verify(self, path: str, expected: str) -> None:
        if (path, expected) in self.seen:
            return
        self.seen.add((path, expected))
        try:
            read_file(self.run, path, expected, self.disk)
        except BrokenObject as fault:
            self.damaged[path] = str(fault)
            self.faults.append(fault)
        except Unreadable as error:
            self.unreadable[path] = f"{path} can't be read now: {error.reason}"
