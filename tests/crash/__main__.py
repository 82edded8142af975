"""Kills calibrate, whole and layer by layer with GPTQ, and export at random moments, gives the same command
again and compares every byte.

`make crash-test`, or `python -m tests.crash --kills 20 --seed 7`. Processes are forked from one that has
imported torch but never used it, so that the kills fall into the work and not into the imports.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from pipeline.demo import make_demo
from pipeline.progress import PlainProgress
from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.settings import CalibrateSettings, ExportSettings
from state.durable import Disk
from state.reader import open_run
from state.recovery import published

GPTQ = "general/ptq/nvfp4_default-kv_none-gptq"
SHARD_SIZE = 200_000  # some 15 shards
LATEST = 0.97  # of the time that writing takes undisturbed: later kills often come too late
POLL = 0.005

Work = Callable[[Path], None]
Content = dict[str, str | bytes]


@dataclass(frozen=True)
class Stage:
    """What is killed. `first`: what it writes first. `content`: compared. `how_far`: told of a kill."""

    name: str
    work: Work
    first: str
    content: Callable[[Path], Content]
    how_far: Callable[[Path], str]


def main() -> int:
    """Runs both stages through all kills. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="kills of each stage")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**32), help="repeats the delays of another run"
    )
    arguments = parser.parse_args()
    print(f"seed {arguments.seed} (--seed={arguments.seed} draws the same delays)", flush=True)
    chance = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="holdfast-crash-"))
    run_to_end(lambda _: make_demo(folder / "demo"), folder, folder / "demo")

    settings = CalibrateSettings(
        model=str(folder / "demo" / "model"),
        data=str(folder / "demo" / "text.jsonl"),
        run=Path("run"),
        samples=120,
        seq=64,
        batch=2,
        commit_every=0.1,
    )

    def measure(_trial: Path) -> None:
        calibrate(settings, PlainProgress(print))

    def solve(_trial: Path) -> None:
        layers = {"recipe": GPTQ, "schedule": "layerwise", "batch": 30, "activation_memory": 1}
        calibrate(settings.model_copy(update=layers), PlainProgress(print))

    def write(trial: Path) -> None:
        settings = ExportSettings(
            run=folder / "calibrate-whole" / "run", out=Path("out"), shard_size=SHARD_SIZE
        )
        export(settings, PlainProgress(print))

    run = Stage("calibrate", measure, "run/HEAD", content_of_run, how_far_run)
    solutions = Stage("solve", solve, "run/HEAD", content_of_run, how_far_run)
    checkpoint = Stage("export", write, "out.partial", content_of_export, how_far_export)
    failed = sum(kill_often(stage, folder, arguments.kills, chance) for stage in (run, solutions, checkpoint))
    if failed:
        print(f"{failed} trials differ or failed; all files are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    print(f"{3 * arguments.kills} kills, {3 * arguments.kills} identical ends")
    return 0


def kill_often(stage: Stage, folder: Path, kills: int, chance: random.Random) -> int:
    """Works undisturbed, then `kills` times with a kill and a second try. Returns how many differ."""
    whole = folder / f"{stage.name}-whole"
    begins, ends = run_to_end(stage.work, whole, whole / stage.first)
    expected = stage.content(whole)
    print(f"{stage.name} writes for {ends - begins:.2f} s; {len(expected)} objects to compare", flush=True)
    failed = number = 0
    while number < kills:
        trial = folder / f"{stage.name}-{number:02d}"
        delay = chance.uniform(0, LATEST * (ends - begins))
        if not killed_after(stage.work, trial, trial / stage.first, delay):
            shutil.rmtree(trial)  # it ended before the kill: draw another moment
            continue
        number += 1
        reached = stage.how_far(trial)
        run_to_end(stage.work, trial, trial / stage.first)
        different = differing(expected, stage.content(trial))
        failed += bool(different)
        said = f"DIFFERS in {', '.join(different[:3])}" if different else "identical"
        kill = f"{stage.name} {number:2d}/{kills}: SIGKILL {delay:.2f} s into it"
        print(f"{kill} ({reached}), the same command again: {said}", flush=True)
        if not different:
            shutil.rmtree(trial)
    return failed


def fork(work: Work, folder: Path) -> int:
    """Starts `work` in a new process, inside `folder`, its output in `log`. Returns the process id."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        work(folder)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_to_end(work: Work, folder: Path, first: Path) -> tuple[float, float]:
    """Does `work` in a process of its own. Returns the seconds until `first` existed and until the end.

    Raises:
        RuntimeError: it failed.
    """
    started = time.monotonic()
    process = fork(work, folder)
    begins = 0.0
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if not begins and first.exists():
            begins = time.monotonic() - started
        time.sleep(POLL)
    check(ended[1], folder)
    return begins, time.monotonic() - started


def check(status: int, folder: Path) -> None:
    """Raises RuntimeError with the log of a process that did not end well."""
    if status != 0:
        raise RuntimeError(f"failed in {folder}: {(folder / 'log').read_text(encoding='utf-8')}")


def killed_after(work: Work, folder: Path, first: Path, delay: float) -> bool:
    """Starts `work` and kills it `delay` seconds after `first` exists. False if it had ended by then.

    Raises:
        RuntimeError: it failed by itself.
    """
    process = fork(work, folder)
    while not first.exists():
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            check(status, folder)
            return False
        time.sleep(POLL)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def content_of_run(trial: Path) -> Content:
    """Digests of all that a finished run keeps, generation numbers aside."""
    calibration = open_run(trial / "run")
    if not calibration.head.finished:
        raise RuntimeError(f"{trial / 'run'} is unfinished")
    generation = f"/{calibration.head.generation}/"
    return {path.replace(generation, "/g/"): seen for path, seen in calibration.head.objects.items()}


def content_of_export(trial: Path) -> Content:
    """All files of a checkpoint, and what is left of an unfinished one."""
    files = [path for path in (*trial.rglob("out/*"), *trial.rglob("out.partial/*")) if path.is_file()]
    return {str(path.relative_to(trial)): path.read_bytes() for path in files}


def how_far_run(trial: Path) -> str:
    """What a killed calibration had committed."""
    if not published(trial / "run", Disk()):
        return "before the run existed"
    head = open_run(trial / "run").head
    return f"commit {head.number}, batch {head.cursor.batch}"


def how_far_export(trial: Path) -> str:
    """What a killed export had written."""
    if (trial / "out").exists():
        return "published"
    shards = len(list((trial / "out.partial").glob("*.safetensors")))
    return f"{shards} shards written"


def differing(expected: Content, found: Content) -> list[str]:
    """Names of what is not the same in both."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


if __name__ == "__main__":
    sys.exit(main())
