"""Power cuts for real: ext4 on a loop device that forgets, under a command, all that it has not written.

Needs root, mkfs.ext4 and loop devices; `missing` says what is not there.
"""

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.crash import server
from tests.crash.commands import SCENARIOS, filled_in
from tests.crash.compare import content
from tests.crash.interposer import READS, Seen
from tests.crash.trial import Laboratory, Result
from tests.crash.verdict import Verdict, judge_end, judge_rest
from tests.crash.world import begin, changed, mine

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
WITHOUT_LOG = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: not even the journal is written
IMAGE_BYTES = 64 << 20
CUT = ("layerwise AWQ", "second pass", "resume", "export AWQ", "export overwriting")
"""The scenarios that are cut, in turn."""


def missing() -> str | None:
    """What this machine lacks for real power cuts, in words; None where it lacks nothing."""
    if os.geteuid() != 0:
        return "root"
    for program in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(program) is None:
            return program
    return None if Path("/dev/loop-control").exists() else "loop devices"


class Cutting:
    """A watcher that cuts the power ahead of operation `number` (from 0) of those that change something."""

    def __init__(self, world: Path, number: int) -> None:
        self._world, self._left = world, number

    def before(self, seen: Seen, half: object) -> None:
        """Cut and die, once."""
        if seen.operation in READS:
            return
        self._left -= 1
        if self._left == -1:
            cut(self._world)
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, seen: Seen) -> None:
        """Nothing."""


def cut(world: Path) -> None:
    """Let the file system that a folder lies on forget what it has not written, and write no more."""
    descriptor = os.open(world, os.O_RDONLY)
    fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_LOG))


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """Within the context the file system in a file is mounted."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True, capture_output=True)


def try_cut(
    laboratory: Laboratory, strata: dict[str, int], scenario_name: str, seed: int, trial: Path
) -> Result:
    """Cut the power under a scenario at an operation drawn, and give the command again."""
    scenario = next(one for one in SCENARIOS if one.name == scenario_name)
    changes = sum(count for stratum, count in strata.items() if stratum.split(" | ")[0] not in READS)
    number = random.Random(seed).randrange(changes)
    trial.mkdir(parents=True)
    image, disk = trial / "image", trial / "disk"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
    arguments = filled_in(scenario.arguments, laboratory.source)
    world = disk / "world"
    expected = laboratory.ends[scenario.name]
    with mounted(image, disk):
        begin(world, laboratory.template(scenario.template))
        subprocess.run(["sync", "-f", world], check=True)
        before = mine(world)
        work = partial(server.command, world, arguments, Cutting(world, number), None, True)
        disturbed = server.call(work, trial / "disturbed")
    with mounted(image, disk):
        wrong = None if disturbed.killed else judge_end(disturbed, content(world, scenario.makes), expected)
        ended = server.call(partial(server.command, world, arguments), trial / "again")
        found = content(world, scenario.makes)
        wrong = wrong or judge_end(ended, found, expected) or judge_rest(ended, found, expected, {}, True)
        if mine(world) != before:
            wrong = Verdict("foreign touched", changed(before, mine(world)))
    verdict = wrong or Verdict("identical" if disturbed.killed else "missed")
    if wrong is None:
        shutil.rmtree(trial)
    return Result(
        scenario.name, "real power cut", "change", number, disturbed.code, verdict.word, verdict.reason
    )
