"""The folder of an export: made as OUT.partial, journaled file by file, then published as OUT. No torch.

    OUT.partial/holdfast_partial.json   the mark: unfinished, and to become OUT
    OUT.partial/holdfast_export.json    the export identity: what this checkpoint is made from
    OUT.partial/holdfast_journal.jsonl  one line per finished file: name, bytes, digest; replaced as a whole
    OUT.partial/holdfast_writing.tmp    the file being written; it gets its name once it is journaled
    OUT.partial/...                     the files; one that the journal does not name is written again

OUT.partial is there with its three records or not at all. The first of its files is export_report.json, which
has the recipe's name; the identity holds its digest. Identity and journal stay in OUT, so that later commands
can tell what OUT is and whether it is whole; while OUT has a mark it is unfinished. No record holds times or
paths. Names prove nothing: what no record of ours names, with its size, is not ours and stays (see
`ownership`). The lock is the file .OUT.lock beside OUT, which stays.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.export.begin import begin_partial
from stages.export.ownership import foreign, is_folder, is_intact, is_ours, make_parents, remove_file
from stages.export.place import Place, find_place
from stages.export.publish import exchange, publish_whole, refuse_obstacles, remove_mark, remove_partial
from stages.export.records import (
    IDENTITY,
    JOURNAL,
    MARK,
    RECORDS,
    WORK_FILES,
    WRITING,
    Written,
    encode_journal,
    is_plain,
    missing_record,
    shown,
    written,
)
from stages.export.shards import Assembly, Made
from stages.export.standing import Wanted, examine, mismatch, read_identity, unfinished_journal
from stages.progress import Progress, Silent
from state.durable import Bytes, Disk
from state.errors import DamagedStore, InputError, RunBusy


class ExportFolder:
    """OUT while it is being made. Get one from `open_folder`, which holds the lock.

    journal: the files that are finished. finished: OUT is whole, and nothing is to be done.
    """

    def __init__(self, place: Place, wanted: Wanted, disk: Disk, overwrite: bool, progress: Progress) -> None:
        self.out, self.partial, self.place = place.out, place.partial, place
        self.wanted, self.disk, self.progress = wanted, disk, progress
        self.remedy = f"move {self.partial} away, then give the same command again"
        self.standing = examine(disk, self.out, wanted, overwrite)
        self.finished = self.standing.journal is not None
        self.journal: dict[str, Written] = dict(self.standing.journal or {})
        if self.finished:
            self._tidy()
            return
        ours = self._ours_in_out()
        refuse_obstacles(self.out, (*wanted.files, *RECORDS), ours)
        if not self._taken_over(overwrite):
            self.journal = begin_partial(disk, place, wanted.identity)
        self._tell_foreign()

    def write(self, name: str, data: Bytes) -> None:
        """Add one file, durably. On return a rerun will not write it again."""
        self._remove_work_files()
        self.disk.put(self.partial / WRITING, data)
        self._enter(written(name, data))

    def write_shard(self, name: str, shard: Assembly, made: Iterable[Made]) -> None:
        """Add a shard as `write` does, while its tensors are made."""
        self._remove_work_files()
        self.disk.put_parts(self.partial / WRITING, shard.nbytes, shard.parts(made))
        self._enter(Written(name, shard.nbytes, shard.digest()))

    def _remove_work_files(self) -> None:
        for work_file in WORK_FILES:
            remove_file(self.disk, self.partial / work_file)

    def _enter(self, entry: Written) -> None:
        """Journal the file just written and give it its name."""
        journal = self.journal | {entry.file: entry}
        self.disk.publish(self.partial / JOURNAL, encode_journal(journal))
        self._settle(entry.file)
        self.journal = journal

    def publish(self) -> None:
        """Make OUT the new export; files of other people in it stay.

        Raises:
            InputError: a foreign file has come where one of the export belongs. All is written: the same
                command goes on once it is away.
        """
        if missing := set(self.wanted.files) - self.journal.keys():
            raise ValueError(f"{shown(missing)} was never written")
        if not self.disk.list(self.out) and not self._foreign_in_partial():
            publish_whole(self.disk, self.partial, self.out)
        elif (present := self.disk.list(self.out)) and not self.standing.replaced:
            raise InputError(
                f"{self.out} was empty and now holds {shown(present)}; move that away, "
                "then give the same command again"
            )
        else:
            refuse_obstacles(self.out, (*self.wanted.files, *RECORDS), self._ours_in_out())
            exchange(
                self.disk,
                self.partial,
                self.out,
                self.wanted.identity,
                self.journal,
                self.standing.replaced,
            )
        self.finished = True

    def _ours_in_out(self) -> set[str]:
        """Names in OUT that may be replaced. Its records are proven by each other, or by its mark."""
        ours = {entry.file for entry in self.standing.replaced if is_ours(self.out, entry)}
        return ours | RECORDS if self.standing.replaced else ours

    def _taken_over(self, overwrite: bool) -> bool:
        """Go on with what an earlier process left in OUT.partial, or remove it. False where there is nothing.

        Raises:
            InputError: OUT.partial is not Holdfast's, or holds foreign files and would be removed.
            IdentityMismatch: it is another export, and `overwrite` is off.
            DamagedStore: its records are damaged, or OUT can't be gone on with, and `overwrite` is off.
        """
        present = self.disk.list(self.partial)
        journal = unfinished_journal(self.disk, self.place) if present else None
        if journal is not None:
            stored = self._stored_identity(journal)
            if stored == self.wanted.identity:
                self._take_over(journal)
                return True
            if not overwrite:
                raise mismatch(self.disk, self.partial, stored, self.wanted)
        if self.standing.exchanging and not overwrite:
            raise DamagedStore(
                f"{self.out} was being replaced, and what was to come into it is not in {self.partial}; "
                "give the command again with --overwrite",
                [self.partial.name],
            )
        if present:
            self._discard(journal)
        return False

    def _stored_identity(self, journal: Mapping[str, Written]) -> dict[str, str]:
        return read_identity(self.disk, self.partial, journal, self.remedy)

    def _take_over(self, journal: Mapping[str, Written]) -> None:
        if unknown := journal.keys() - {IDENTITY} - set(self.wanted.files):
            raise DamagedStore(
                f"{self.partial / JOURNAL} names {shown(unknown)}, which this export does not have; "
                f"{self.remedy}",
                [JOURNAL],
            )
        refuse_obstacles(self.partial, set(self.wanted.files) - journal.keys(), ())
        self.journal = {name: entry for name, entry in journal.items() if self._is_there(entry)}
        for name in sorted(journal.keys() - self.journal.keys()):
            path = self.partial / name
            if os.path.lexists(path):
                if not is_ours(self.partial, journal[name]):
                    raise DamagedStore(
                        f"{path} is not as Holdfast wrote it: another size, or no file. Move it away, then "
                        "give the same command again; it will be written anew.",
                        [name],
                    )
                self.disk.remove(path)
            self.progress.note(f"{path} is missing or damaged; it is written again")

    def _is_there(self, entry: Written) -> bool:
        """Whether a journaled file is intact: in its place, already in OUT, or still to get its name."""
        if is_intact(self.partial, entry):
            return True
        if os.path.lexists(self.partial / entry.file):
            return False
        if self.standing.exchanging and is_intact(self.out, entry):
            return True
        if not is_intact(self.partial, Written(WRITING, entry.bytes, entry.digest)):
            return False
        self._settle(entry.file)
        return True

    def _settle(self, name: str) -> None:
        """Give the file just written its name."""
        refuse_obstacles(self.partial, [name], ())
        make_parents(self.disk, self.partial, name)
        self.disk.rename(self.partial / WRITING, self.partial / name)

    def _discard(self, journal: Mapping[str, Written] | None) -> None:
        """Remove an OUT.partial of another export, or of none. journal: None where there is none."""
        named = list((journal or {}).values())
        strangers = foreign(self.disk, self.partial, named, (*RECORDS, *WORK_FILES))
        if strangers and journal is None and set(strangers) & set(self.wanted.files):
            raise missing_record(
                self.partial / JOURNAL,
                f"it says which of {shown(strangers)} are whole. Move {self.partial} away, then give the "
                "same command again",
            )
        if strangers:
            raise InputError(
                f"{self.partial} would be removed, but holds {shown(strangers)}, not as Holdfast wrote it "
                "or not Holdfast's; move it away, then give the same command again"
            )
        remove_partial(self.disk, self.partial, named)

    def _tidy(self) -> None:
        """Do what a kill between the last file and the end has left to do."""
        if self.standing.mark is None:
            return
        if self.standing.exchanging and is_folder(self.partial):
            self._remove_rest()
        remove_mark(self.disk, self.out)

    def _remove_rest(self) -> None:
        """Remove what an exchange has left of OUT.partial, but not what another command may go on with."""
        present = self.disk.list(self.partial)
        if present and MARK not in present:
            return
        journal = unfinished_journal(self.disk, self.place) if present else None
        if journal is None or self._stored_identity(journal) == self.wanted.identity:
            remove_partial(self.disk, self.partial, (journal or {}).values())

    def _foreign_in_partial(self) -> list[str]:
        entries = list(self.journal.values())
        return foreign(self.disk, self.partial, entries, (*RECORDS, *WORK_FILES))

    def _tell_foreign(self) -> None:
        """Name what is not ours and stays."""
        kept = {
            self.partial: self._foreign_in_partial(),
            self.out: foreign(self.disk, self.out, self.standing.replaced, RECORDS),
        }
        for folder, names in kept.items():
            if names:
                self.progress.warn(
                    f"{folder} holds {shown(names)}, which Holdfast did not write; it stays there"
                )


def refuse_names(names: Iterable[str]) -> None:
    """Raise InputError for a name that no file of a checkpoint can have."""
    if strange := [name for name in names if not is_plain(name) or name in (*RECORDS, *WORK_FILES)]:
        raise InputError(
            f"{strange[0]!r} can't be the name of a file in a checkpoint; rename it in the source"
        )


@contextmanager
def locked(place: Place, disk: Disk) -> Iterator[None]:
    """Hold the lock of OUT. Raises RunBusy where another process has it, InputError where it can't be had."""
    with ExitStack() as stack:
        try:
            stack.enter_context(disk.lock(place.lock))
        except RunBusy:
            raise RunBusy(
                f"another process is exporting to {place.out}. Wait until it ends, or stop it, then give the "
                "same command again."
            ) from None
        yield


@contextmanager
def open_folder(
    out: Path, wanted: Wanted, disk: Disk, overwrite: bool = False, progress: Progress | None = None
) -> Iterator[ExportFolder]:
    """Lock OUT and find out where its export stands.

    Raises:
        RunBusy: another process is exporting to OUT.
        InputError: OUT or what lies beside it is something else, or may not be read or written.
        IdentityMismatch: OUT or OUT.partial is an export of something else, and `overwrite` is off.
        DamagedStore: OUT is this export with other bytes than were written, and `overwrite` is off; or
            records say nothing that could be trusted.
    """
    place = find_place(out)
    refuse_names(wanted.files)
    with locked(place, disk):
        yield ExportFolder(place, wanted, disk, overwrite, progress or Silent())
