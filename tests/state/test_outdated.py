"""Solutions that a commit takes out of a run: set aside, named by no later commit, and made again."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from state.durable import Disk
from state.head import Cursor
from state.objects import solutions
from state.reader import open_run
from state.store import RunWriter
from state.update import Solution, Update
from tests.state.faults import CountingDisk, Crash, CrashingDisk, TearingDisk
from tests.state.test_crash import nothing_left_over

SOLVER, OTHER = "gptq-1", "gptq-2"
CURSOR = Cursor(pass_number=1)


def solution(layer: int, value: float, solver: str = SOLVER) -> Solution:
    return Solution(solver, layer, {"scale": np.array([value], np.float32)}, {"behind": value})


def first(run: Path) -> None:
    """Layers 1 and 2 are solved, layer 0 is not; another solver has layer 1 too."""
    with RunWriter.resume(run) as writer:
        made = (solution(1, 1.0), solution(2, 1.0), solution(1, 3.0, OTHER))
        writer.commit(Update(CURSOR, True, solutions=made))


def go_on(run: Path, disk: Disk | None = None) -> None:
    """Layer 0 comes out so that the others hold no more; then these."""
    with RunWriter.resume(run, disk) as writer:
        solved = solutions(writer.head.objects).get(SOLVER, set())
        if 0 not in solved:
            outdated = tuple((SOLVER, layer) for layer in sorted(solved))
            writer.commit(Update(CURSOR, True, solutions=(solution(0, 2.0),), outdated=outdated))
        solved = solutions(writer.head.objects)[SOLVER]
        for layer in sorted({1, 2} - solved):
            writer.commit(Update(CURSOR, True, solutions=(solution(layer, 2.0),)))


def values(run: Path) -> dict[int, float]:
    reader = open_run(run)
    return {layer: reader.solution(SOLVER, layer).arrays["scale"].item() for layer in range(3)}


def test_outdated_solutions_are_set_aside_and_made_again(finished: Path) -> None:
    first(finished)
    with RunWriter.resume(finished) as writer:
        outdated = ((SOLVER, 1), (SOLVER, 2))
        head = writer.commit(Update(CURSOR, True, solutions=(solution(0, 2.0),), outdated=outdated))
        assert solutions(head.objects) == {SOLVER: {0}, OTHER: {1}, "awq-test": {2}}
        assert "made behind others than there are now are set aside in" in writer.notes[-1]
    aside = sorted(path.parts[-3] for path in (finished / "set-aside").rglob("scale/c.0"))
    assert aside == ["1", "2"] and open_run(finished).notes == ()
    go_on(finished)
    assert values(finished) == {0: 2.0, 1: 2.0, 2: 2.0}
    assert open_run(finished).solution(OTHER, 1).arrays["scale"] == 3.0
    assert open_run(finished).notes == () and nothing_left_over(finished)


@pytest.mark.parametrize("kind", [CrashingDisk, TearingDisk])
def test_crash_at_every_step(tmp_path: Path, finished: Path, kind: type[CrashingDisk]) -> None:
    first(finished)
    counting = CountingDisk()
    copy(finished, tmp_path / "counted")
    go_on(tmp_path / "counted", counting)
    assert len(counting.steps) > 60
    assert len([step for step, _ in counting.steps if step == "move"]) >= 4
    for at in range(len(counting.steps)):
        run = tmp_path / f"at{at}"
        copy(finished, run)
        with pytest.raises(Crash):
            go_on(run, kind(at))
        go_on(run)
        assert values(run) == {0: 2.0, 1: 2.0, 2: 2.0}, f"crash at step {at}"
        assert nothing_left_over(run), f"crash at step {at}"


def copy(run: Path, to: Path) -> None:
    shutil.copytree(run, to)
