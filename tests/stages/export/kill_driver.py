"""Kills an export at every operation of its folder, each time in a fresh fork, and finishes it. Needs no
torch.

usage: kill_driver.py SCRATCH. Prints one JSON object: for each scenario the number of kills survived.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from stages.export.folder import open_folder
from stages.export.records import IDENTITY as RECORD
from stages.export.records import JOURNAL, MARK, WRITING
from stages.export.shards import Assembly, Made, TensorSpec
from stages.export.standing import Wanted
from state.durable import Disk

IDENTITY = {"run.statistics": "xxh3:1", "recipe": "xxh3:2"}
OTHER = {"run.statistics": "xxh3:1", "recipe": "xxh3:9"}
SPECS = [TensorSpec("scale", "F32", ()), TensorSpec("weight", "U8", (50,))]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = ("config.json", "templates/chat/a.jinja")
FILES = (*SHARDS, *SMALL)
FOREIGN = ("README.md", "eval/run 1/scores.json", "templates/mine.jinja", "templates/chat/b.jinja")
"""Names of a person's files inside OUT."""


class KillAt(Disk):
    """Dies by SIGKILL ahead of operation number `at`; ahead of an fsync it first cuts the file in half."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            if operation == "fsync":
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


class CountPuts(Disk):
    """Counts new files by the names that they get once they are written."""

    def __init__(self) -> None:
        self.put_names: list[str] = []
        self.writing = False

    def before(self, operation: str, path: Path) -> None:
        if operation == "rename" and self.writing:
            self.put_names.append(path.name)
        if operation in ("put", "rename"):
            self.writing = path.name == WRITING


def make(
    out: Path, identity: dict[str, str], disk: Disk, overwrite: bool = False, shards: int = len(SHARDS)
) -> None:
    """One small export: two shards, a config and a template, their content depending on the identity.

    shards: how many of the shards are written; with fewer than all of them, OUT.partial is left unfinished.
    """
    with open_folder(out, Wanted(identity, FILES), disk, overwrite) as folder:
        if folder.finished:
            return
        for number, shard in enumerate(SHARDS[:shards]):
            if shard not in folder.journal:
                seed = f"{identity['recipe']}{number}".encode()
                made = [Made(spec.name, (seed * 50)[: spec.nbytes]) for spec in SPECS]
                folder.write_shard(shard, Assembly(SPECS), made)
        if shards < len(SHARDS):
            return
        for name in SMALL:
            if name not in folder.journal:
                folder.write(name, f"{name} of {identity['recipe'][:-1]}".encode())
        folder.publish()


def add_foreign(folder: Path) -> None:
    """A person's files, in folders of their own and in those of the export."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"by hand: {name}")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed(out: Path, at: int, overwrite: bool) -> bool:
    """Make the export in a fork that dies at operation `at`; False when it finished before."""
    child = os.fork()
    if child == 0:
        make(out, IDENTITY, KillAt(at), overwrite)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def survive(
    scratch: Path,
    whole: dict[str, bytes],
    prepare: Callable[[Path], None],
    overwrite: bool = False,
    twice: bool = False,
) -> int:
    """Kill at every operation. After each, OUT is as it was, marked as unfinished or whole, and foreign files
    are untouched; one more run finishes it.

    twice: the run after each kill is killed too, at a random operation, before the one that finishes it.
    """
    kills, chance = 0, random.Random(11)
    while True:
        shutil.rmtree(scratch, ignore_errors=True)
        out = scratch / "out"
        (scratch / "out.replaced").mkdir(parents=True)
        add_foreign(scratch / "out.replaced")
        prepare(out)
        before = tree(out)
        beside = {name for name in Disk().list(scratch) if not name.startswith(("out.partial", ".out"))}
        foreign = {name: data for name, data in tree(scratch).items() if data.startswith(b"by hand")}
        inside = {name: before[name] for name in FOREIGN if name in before}
        if not killed(out, kills, overwrite):
            return kills
        for again in (False, True)[: 1 + twice]:
            if again:
                killed(out, chance.randrange(60), overwrite)
            left = tree(out)
            if left not in (before, whole | inside) and MARK not in left:
                raise SystemExit(f"kill {kills}: OUT looks finished and is not: {sorted(left)}")
            check_foreign(kills, scratch, foreign)
        done, disk = journaled(scratch / "out.partial"), CountPuts()
        make(out, IDENTITY, disk, overwrite)
        if tree(out) != whole | inside:
            raise SystemExit(f"kill {kills}: the finished export differs: {sorted(tree(out))}")
        if repeated := done & set(disk.put_names):
            raise SystemExit(f"kill {kills}: written again although journaled: {repeated}")
        check_foreign(kills, scratch, foreign)
        if set(Disk().list(scratch)) != beside | {"out", ".out.lock"}:
            raise SystemExit(f"kill {kills}: left behind: {Disk().list(scratch)}")
        kills += 1


def journaled(partial: Path) -> set[str]:
    """Names of the files that need not be written again."""
    if not (partial / JOURNAL).exists() or json.loads((partial / RECORD).read_text()) != IDENTITY:
        return set()
    return {json.loads(line)["file"] for line in (partial / JOURNAL).read_text().splitlines()} - {RECORD}


def check_foreign(kills: int, scratch: Path, foreign: dict[str, bytes]) -> None:
    """Ends the driver unless a person's files are there with the bytes that they had."""
    found = {name: data for name, data in tree(scratch).items() if data.startswith(b"by hand")}
    if found != foreign:
        raise SystemExit(f"kill {kills}: foreign files were touched: {sorted(foreign)}, now {sorted(found)}")


def main() -> None:
    scratch = Path(sys.argv[1])
    os.fsync = lambda _: None  # a kill, unlike a power cut, forgets nothing
    make(scratch / "whole", IDENTITY, Disk())
    whole = tree(scratch / "whole")

    def older(out: Path) -> None:
        make(out, OTHER, Disk())

    def older_among_foreign_files(out: Path) -> None:
        make(out, OTHER, Disk())
        add_foreign(out)

    survived = {
        "fresh": survive(scratch / "fresh", whole, lambda _: None),
        "resumed": survive(scratch / "resumed", whole, lambda out: make(out, IDENTITY, Disk(), shards=1)),
        "overwrite": survive(scratch / "overwrite", whole, older, overwrite=True),
        "foreign": survive(scratch / "foreign", whole, older_among_foreign_files, overwrite=True, twice=True),
        "other partial": survive(
            scratch / "other", whole, lambda out: make(out, OTHER, Disk(), shards=1), overwrite=True
        ),
    }
    print(json.dumps(survived | {"torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main()
