"""The folder of an export: made as OUT.partial, journaled file by file, published by one rename. No torch.

    OUT.partial/holdfast_export.json    the export identity: what this checkpoint is made from; written first
    OUT.partial/holdfast_journal.jsonl  one line per finished file: name, bytes, digest; replaced as a whole
    OUT.partial/...                     the files; one that the journal does not name is written again

The first of the files is export_report.json, which has the recipe's name; the identity holds its digest. Both
records stay in OUT, so that a later command can tell what OUT is and whether it is whole. They hold no
times and no paths. The lock is the file .OUT.lock beside OUT, which stays.
"""

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from state.durable import Bytes, Disk
from state.errors import DamagedStore, Difference, IdentityMismatch, InputError, RunBusy
from state.identity import digest

IDENTITY = "holdfast_export.json"
JOURNAL = "holdfast_journal.jsonl"
REPORT = "export_report.json"
RECORDS = frozenset({IDENTITY, JOURNAL, IDENTITY + ".tmp", JOURNAL + ".tmp"})


@dataclass(frozen=True)
class Written:
    """One finished file; digest is `xxh3:<32 hex digits>` of its bytes."""

    file: str
    bytes: int
    digest: str


class ExportFolder:
    """OUT while it is being made. Get one from `open_folder`, which holds the lock."""

    def __init__(
        self, out: Path, identity: Mapping[str, str], disk: Disk, overwrite: bool, recipe: str | None
    ) -> None:
        self.out, self.identity, self.disk, self.recipe = out, dict(identity), disk, recipe
        self.partial = out.with_name(out.name + ".partial")
        self.replaced = out.with_name(out.name + ".replaced")
        self.journal: dict[str, Written] = {}
        self.finished = self._finished(overwrite)
        if not self.finished:
            self._resume(overwrite)

    def write(self, name: str, data: Bytes) -> None:
        """Add one file, durably. On return a rerun will not write it again."""
        path = self.partial / name
        if path.exists():
            self.disk.delete(path)
        self.disk.put(path, data)
        self.disk.sync(dict.fromkeys((path.parent, self.partial)))
        self.journal[name] = Written(name, len(data), digest(data))
        self.disk.publish(self.partial / JOURNAL, _encode_journal(self.journal))

    def publish(self) -> None:
        """Make OUT.partial OUT, in one step. What OUT was before is gone only afterwards."""
        named = {Path(file).parts[0] for file in self.journal} | {IDENTITY, JOURNAL}
        for stray in set(self.disk.list(self.partial)) - named:
            self.disk.delete(self.partial / stray)
        if self.disk.list(self.out):
            self._remove_export(self.replaced)
            self.disk.rename(self.out, self.replaced)
        self.disk.rename(self.partial, self.out)
        self._remove_export(self.replaced)
        self.finished = True

    def _finished(self, overwrite: bool) -> bool:
        if not self.disk.list(self.out):
            return False
        stored = self._stored_identity(self.out)
        if stored is None:
            raise InputError(
                f"{self.out} exists and is no export of Holdfast; choose another OUT, or remove it"
            )
        if stored != self.identity:
            if not overwrite:
                raise self._mismatch(self.out, stored)
            return False
        journal = _read_journal(self.disk, self.out)
        damaged = [name for name, entry in journal.items() if not _intact(self.out / name, entry)]
        if damaged or not journal:
            if not overwrite:
                names = ", ".join(damaged[:5]) or JOURNAL
                raise DamagedStore(
                    f"{self.out} is this export, but {names} is missing or damaged; give the command again "
                    "with --overwrite",
                    damaged,
                )
            return False
        self.journal = journal
        self._remove_export(self.replaced)
        return True

    def _resume(self, overwrite: bool) -> None:
        """Take over what an earlier process left in OUT.partial, if it was making the same checkpoint."""
        present = self.disk.list(self.partial)
        stored = self._stored_identity(self.partial) if present else None
        if present and stored is None:
            if not set(present) <= RECORDS:
                raise InputError(
                    f"{self.partial} exists and is no export of Holdfast; remove it, or choose another OUT"
                )
            self.disk.delete(self.partial)
        elif stored is not None and stored != self.identity:
            if not overwrite:
                raise self._mismatch(self.partial, stored)
            self._remove_export(self.partial)
        elif stored is not None:
            journal = _read_journal(self.disk, self.partial)
            self.journal = {
                name: entry for name, entry in journal.items() if _intact(self.partial / name, entry)
            }
            return
        self.disk.publish(self.partial / IDENTITY, _encode_identity(self.identity))
        self.disk.sync([self.partial.parent])

    def _stored_identity(self, folder: Path) -> dict[str, str] | None:
        try:
            content = json.loads(self.disk.read(folder / IDENTITY))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def _mismatch(self, folder: Path, stored: Mapping[str, str]) -> IdentityMismatch:
        current = self.identity
        found = [
            Difference(field, stored.get(field), current.get(field))
            for field in sorted(stored.keys() | current.keys())
            if stored.get(field) != current.get(field)
        ]
        lines = [f"{folder} is another export; {len(found)} field(s) differ:"]
        for difference in found:
            if difference.field == "recipe":
                difference = self._with_names(folder, difference)
            lines.append(f"  {difference}")
        lines.append("choose another OUT, or replace it with --overwrite")
        return IdentityMismatch("\n".join(lines), found)

    def _with_names(self, folder: Path, recipes: Difference) -> Difference:
        """The digests of two recipes, with the recipes' names where they are known."""
        try:
            stored = json.loads(self.disk.read(folder / REPORT)).get("recipe")
        except (OSError, ValueError, AttributeError):
            stored = None
        return Difference(recipes.field, _named(stored, recipes.stored), _named(self.recipe, recipes.current))

    def _remove_export(self, folder: Path) -> None:
        """Remove a folder of ours, its identity last: what a kill leaves of it is known as ours."""
        if not self.disk.list(folder):
            return
        if self._stored_identity(folder) is None:
            raise InputError(f"{folder} is in the way and is no export of Holdfast; remove it")
        for name in self.disk.list(folder):
            if name != IDENTITY:
                self.disk.delete(folder / name)
        self.disk.delete(folder)


@contextmanager
def open_folder(
    out: Path,
    identity: Mapping[str, str],
    disk: Disk,
    overwrite: bool = False,
    recipe: str | None = None,
) -> Iterator[ExportFolder]:
    """Lock OUT and find out where its export stands.

    recipe: the recipe's name, for people; the identity holds the digest of what it says.

    Raises:
        RunBusy: another process is exporting to OUT.
        InputError: OUT or OUT.partial is something else, or may not be written.
        IdentityMismatch: OUT or OUT.partial is an export of something else, and `overwrite` is off.
        DamagedStore: OUT is this export with other bytes than were written, and `overwrite` is off.
    """
    _refuse_impossible(out)
    with ExitStack() as stack:
        try:
            stack.enter_context(disk.lock(out.with_name(f".{out.name}.lock")))
        except RunBusy:
            raise RunBusy(
                f"another process is exporting to {out}. Wait until it ends, or stop it, then give the same "
                "command again."
            ) from None
        yield ExportFolder(out, identity, disk, overwrite, recipe)


def _refuse_impossible(out: Path) -> None:
    """Raise InputError where no folder can be made at `out`."""
    if out.name in ("", ".."):
        raise InputError(f"{out} is no name for a folder to be made; choose another OUT")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; OUT must be a folder to be made")
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a folder, so {out} can't be made; choose another OUT")


def _named(name: str | None, content: str | None) -> str | None:
    return f"{name} ({content})" if name and content else content


def _encode_identity(identity: Mapping[str, str]) -> bytes:
    return (json.dumps(dict(sorted(identity.items())), indent=2, ensure_ascii=False) + "\n").encode()


def _encode_journal(journal: Mapping[str, Written]) -> bytes:
    lines = [json.dumps(vars(journal[name]), ensure_ascii=False) + "\n" for name in sorted(journal)]
    return "".join(lines).encode()


def _read_journal(disk: Disk, folder: Path) -> dict[str, Written]:
    """What the journal names: nothing, if it is missing or malformed, so that all is written again."""
    try:
        lines = disk.read(folder / JOURNAL).decode().splitlines()
        entries = [Written(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return {}
    return {entry.file: entry for entry in entries}


def _intact(path: Path, entry: Written) -> bool:
    try:
        if path.stat().st_size != entry.bytes:
            return False
        if entry.bytes == 0:
            return digest(b"") == entry.digest
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return digest(memoryview(view)) == entry.digest
    except OSError:
        return False
