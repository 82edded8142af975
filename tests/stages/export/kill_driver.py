"""Kills an export at every operation of its folder, each time in a fresh fork, and finishes it. Needs no
torch.

usage: kill_driver.py SCRATCH. Prints one JSON object: for each scenario the number of kills survived.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from stages.export.folder import open_folder
from stages.export.shards import TensorSpec, encode
from state.durable import Disk

IDENTITY = {"run.statistics": "xxh3:1", "recipe": "xxh3:2"}
OTHER = {"run.statistics": "xxh3:1", "recipe": "xxh3:9"}
SPECS = [TensorSpec("scale", "F32", ()), TensorSpec("weight", "U8", (50,))]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


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
    """Counts new files by name."""

    def __init__(self) -> None:
        self.put_names: list[str] = []

    def before(self, operation: str, path: Path) -> None:
        if operation == "put":
            self.put_names.append(path.name)


def make(out: Path, identity: dict[str, str], disk: Disk, overwrite: bool = False) -> None:
    """One small export: two shards and a config, their content depending on the identity."""
    with open_folder(out, identity, disk, overwrite) as folder:
        if folder.finished:
            return
        for number, shard in enumerate(SHARDS):
            if shard not in folder.journal:
                seed = f"{identity['recipe']}{number}".encode()
                folder.write(shard, encode(SPECS, lambda spec, seed=seed: (seed * 50)[: spec.nbytes]))
        if "config.json" not in folder.journal:
            folder.write("config.json", b"{}\n")
        folder.publish()


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


def survive(scratch: Path, whole: dict[str, bytes], before: dict[str, bytes] | None) -> int:
    """Kill at every operation. After each, OUT is as it was, set aside or whole; one more run finishes it."""
    kills = 0
    while True:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        out = scratch / "out"
        if before is not None:
            make(out, OTHER, Disk())
        if not killed(out, kills, overwrite=before is not None):
            return kills
        left = tree(out) if out.exists() else None
        if left not in (None, before, whole):
            raise SystemExit(f"kill {kills}: OUT is half published: {sorted(left or {})}")
        if left is None and before is not None and tree(scratch / "out.replaced") != before:
            raise SystemExit(f"kill {kills}: neither the old export nor the new one is there")
        journal = scratch / "out.partial" / "holdfast_journal.jsonl"
        done = (
            [json.loads(line)["file"] for line in journal.read_text().splitlines()]
            if journal.exists()
            else []
        )
        disk = CountPuts()
        make(out, IDENTITY, disk, overwrite=before is not None)
        if tree(out) != whole:
            raise SystemExit(f"kill {kills}: the finished export differs")
        if repeated := set(done) & set(disk.put_names):
            raise SystemExit(f"kill {kills}: written again although journaled: {repeated}")
        if {path.name for path in scratch.iterdir()} != {"out", ".out.lock"}:
            raise SystemExit(f"kill {kills}: left behind: {list(scratch.iterdir())}")
        kills += 1


def main() -> None:
    scratch = Path(sys.argv[1])
    make(scratch / "whole", IDENTITY, Disk())
    make(scratch / "other", OTHER, Disk())
    whole, other = tree(scratch / "whole"), tree(scratch / "other")
    survived = {
        "fresh": survive(scratch / "fresh", whole, None),
        "overwrite": survive(scratch / "overwrite", whole, other),
    }
    print(json.dumps(survived | {"torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main()
