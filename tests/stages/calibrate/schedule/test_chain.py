"""A solution that is made again: those behind it hold if it comes out the same, or are made again too."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stages.calibrate.run import calibrate
from stages.calibrate.schedule import solving
from stages.export.run import export
from stages.progress import Silent
from stages.settings import ExportSettings
from state.claim import create_run
from state.errors import InputError
from state.objects import solutions
from state.reader import open_run
from state.update import Solution, Update
from tests.stages.calibrate import runs
from tests.stages.calibrate.schedule.test_layerwise import GPTQ
from tests.stages.calibrate.schedule.two_streams import looking
from tests.stages.export import support

LAYERS = 4
settings = partial(runs.settings, samples=6, batch=3, recipe=GPTQ)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, and a run of GPTQ."""
    folder = tmp_path_factory.mktemp("inputs")
    support.make_model(folder / "model", support.config_of("llama", num_hidden_layers=LAYERS))
    support.make_text(folder / "text.jsonl")
    calibrate(settings(folder, folder / "run"), Silent())
    return folder


def solver_of(run: Path) -> str:
    (solver_id,) = solutions(open_run(run).head.objects)
    return solver_id


def found(run: Path) -> dict[int, tuple[dict[str, bytes], dict[str, Any]]]:
    reader, solver_id = open_run(run), solver_of(run)
    every = {layer: reader.solution(solver_id, layer) for layer in range(LAYERS)}
    return {
        layer: ({name: values.tobytes() for name, values in one.arrays.items()}, dict(one.attributes))
        for layer, one in every.items()
    }


def without_layer(inputs: Path, run: Path, layer: int) -> Path:
    """A copy of the run in which the solution of a layer is lost."""
    shutil.copytree(inputs / "run", run)
    shutil.rmtree(run / "calibration.zarr" / "solutions" / solver_of(run) / str(layer))
    return run


def test_each_solution_names_all_that_it_was_made_behind(inputs: Path) -> None:
    solved = found(inputs / "run")
    digests = {layer: attributes["digest"] for layer, (_, attributes) in solved.items()}
    assert len(set(digests.values())) == LAYERS
    for layer, (_, attributes) in solved.items():
        assert attributes["behind"] == {str(before): digests[before] for before in range(layer)}


def test_those_behind_one_that_comes_out_the_same_stay(inputs: Path, tmp_path: Path) -> None:
    run, progress = without_layer(inputs, tmp_path / "run", 1), runs.Interrupting(0, runs.crash)
    with looking() as looked:
        calibrate(settings(inputs, run), progress)
    assert looked.moments.keys() == {1} and found(run) == found(inputs / "run")
    assert not any("solved behind" in warning for warning in progress.warnings)


def otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is solved comes out otherwise than before, as on another machine it may."""
    solve_layer = solving.solve_layer
    monkeypatch.setattr(
        solving, "solve_layer", lambda *args, **options: solve_layer(*args, **options | {"damping": 0.5})
    )


def test_those_behind_one_that_comes_out_otherwise_are_made_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 stays; the end is that of a run whose layer 1 had come out so at once."""
    run, progress = without_layer(inputs, tmp_path / "run", 1), runs.Interrupting(0, runs.crash)
    otherwise(monkeypatch)
    with looking() as looked:
        calibrate(settings(inputs, run), progress)
    assert looked.moments.keys() == {1, 2, 3}
    said = [warning for warning in progress.warnings if "solved behind" in warning]
    assert said == [
        "layers 2, 3 were solved behind another solution of layer 1 than there is now; this is done again"
    ]
    before, after = found(inputs / "run"), found(run)
    assert after[0] == before[0]
    for layer in (1, 2, 3):
        assert after[layer][0] != before[layer][0]
        assert after[layer][1]["behind"] == {str(one): after[one][1]["digest"] for one in range(layer)}
    assert len(list((run / "set-aside").rglob("solutions/*/[23]/zarr.json"))) == 2
    assert calibrate(settings(inputs, run), Silent()).already_finished
    export(ExportSettings(run=run, out=tmp_path / "out", recipe=GPTQ), Silent())


def test_a_crash_between_two_of_them_changes_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    otherwise(monkeypatch)
    whole = without_layer(inputs, tmp_path / "whole", 1)
    calibrate(settings(inputs, whole), Silent())
    run = without_layer(inputs, tmp_path / "run", 1)
    with pytest.raises(runs.Crash):
        # The last batch of layer 2: layer 1 is committed, the others are set aside.
        calibrate(settings(inputs, run), runs.Interrupting(4, runs.crash))
    assert solutions(open_run(run).head.objects)[solver_of(run)] == {0, 1}
    calibrate(settings(inputs, run), Silent())
    assert found(run) == found(whole)


def mixed(inputs: Path, run: Path) -> Path:
    """A run whose layer 1 is another than layers 2 and 3 were made behind."""
    stored, solver_id = open_run(inputs / "run"), solver_of(inputs / "run")
    made = []
    for layer in range(LAYERS):
        solution = stored.solution(solver_id, layer)
        attributes = dict(solution.attributes) | ({"digest": "xxh3:other"} if layer == 1 else {})
        made.append(Solution(solver_id, layer, dict(solution.arrays), attributes))
    with create_run(run, stored.record, stored.tokens) as writer:
        writer.commit(Update(stored.head.cursor, True, stored.generation(), tuple(made)))
    return run


def test_a_run_that_holds_a_broken_chain_is_not_exported_but_mended(inputs: Path, tmp_path: Path) -> None:
    run, wanted = mixed(inputs, tmp_path / "run"), {"out": tmp_path / "out", "recipe": GPTQ}
    message = r"layers 2, 3 were solved behind another solution of layer 1 .*with: holdfast calibrate .*gptq"
    with pytest.raises(InputError, match=message):
        export(ExportSettings(run=run, **wanted), Silent())
    with looking() as looked:
        calibrate(settings(inputs, run), Silent())
    assert looked.moments.keys() == {2, 3}
    export(ExportSettings(run=run, **wanted), Silent())
