"""The table of families: `python -m tests.families`, or `make test-families`.

Every family of the catalogue goes through every recipe and schedule; results are kept in a folder and used
again while the code is the same. docs/families.md is written at the end. Exits 1 where anything is wrong.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import textwrap
import time
import traceback
from pathlib import Path

from tests.families.catalogue import FAMILIES
from tests.families.cells import run_family
from tests.families.table import write_table

ROOT = Path(__file__).parents[2]
CODE = ("holdfast", "pipeline", "stages", "state", "tests/families")


def main() -> int:
    """Run what has no results yet, write the table, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all by default")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/families"), help="folder for results and runs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="use no earlier results")
    options = parser.parse_args()
    names = options.names or list(FAMILIES)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    import_everything()
    began = time.monotonic()
    code = code_digest()
    left = [name for name in names if options.fresh or not kept(work / f"{name}.json", code)]
    shares = [left[worker :: options.workers] for worker in range(options.workers)]
    workers = [fork_worker(share, work, code) for share in shares if share]
    for process in workers:
        os.waitpid(process, 0)
    print(f"{len(left)} families in {time.monotonic() - began:.0f} s")
    if set(names) == set(FAMILIES):
        write_table(work, ROOT / "docs" / "families.md")
    wrong = [line for name in names for line in wrong_cells(name, work / f"{name}.json")]
    print("\n".join(wrong))
    return 1 if wrong else 0


def wrong_cells(name: str, results: Path) -> list[str]:
    """What is wrong with a family: each first fault once, with the cells that have it."""
    cells: dict[str, list[str]] = {}
    for cell in json.loads(results.read_text())["cells"]:
        if cell["verdict"] == "wrong":
            fault = textwrap.shorten(cell["said"][0], 200) + f" (and {len(cell['said']) - 1} more)"
            cells.setdefault(fault, []).append(f"{cell['column']} {cell['schedule']}")
    return [f"wrong: {name}: {fault}: {', '.join(where)}" for fault, where in cells.items()]


def fork_worker(names: list[str], work: Path, code: str) -> int:
    """A process that runs families one after the other. Returns its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    for name in names:
        began = time.monotonic()
        try:
            cells = [dataclasses.asdict(cell) for cell in run_family(FAMILIES[name](), work / name)]
        except Exception as error:
            traceback.print_exc()
            cells = [
                {"column": "all", "schedule": "", "verdict": "wrong", "said": [repr(error)], "seconds": 0}
            ]
        (work / f"{name}.json").write_text(json.dumps({"code": code, "cells": cells}, indent=1))
        verdicts = [cell["verdict"] for cell in cells]
        if "wrong" not in verdicts:
            shutil.rmtree(work / name)
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
        print(f"{name}: {counts} in {time.monotonic() - began:.0f} s", flush=True)
    sys.stdout.flush()
    os._exit(0)


def kept(file: Path, code: str) -> bool:
    """Whether there is a result of this very code."""
    return file.exists() and json.loads(file.read_text())["code"] == code


def code_digest() -> str:
    """Of all code that a result depends on."""
    digest = hashlib.sha256()
    for room in CODE:
        for file in sorted((ROOT / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def import_everything() -> None:
    """Import what the commands import, so that forks find it imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import modelopt.torch.quantization  # noqa: F401

    import stages.calibrate.run
    import stages.capture
    import stages.export.run  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
