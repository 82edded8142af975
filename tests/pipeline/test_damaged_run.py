"""A damaged run, as a person meets it: exports that need nothing of what is damaged go on, and calibrating
makes again only what is lost.
"""

import shutil
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipeline.cli import app
from state.objects import solutions
from state.reader import open_run

runner = CliRunner(env={"COLUMNS": "200"})

SIZES = ["--samples", "8", "--seq", "64", "--batch", "4", "--recipe", "nvfp4_awq_lite"]


def calibrate(demo: Path, run: Path) -> Result:
    return runner.invoke(app, ["calibrate", str(demo / "model"), str(demo / "text.jsonl"), str(run), *SIZES])


def export(run: Path, out: Path, recipe: str) -> Result:
    return runner.invoke(app, ["export", str(run), str(out), "--recipe", recipe])


def stored(run: Path) -> dict[str, bytes]:
    """Every file of the newest commit, without the number of its generation."""
    head = open_run(run).head
    return {path.replace(str(head.generation), "g"): (run / path).read_bytes() for path in head.objects}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    done = calibrate(demo, run)
    assert done.exit_code == 0, done.stderr
    assert export(run, run.parent / "fp8", "fp8").exit_code == 0
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    ["run.json", "calibration.zarr/tokens/c.0.0", "calibration.zarr/zarr.json", "HEAD", "heads/000004.json"],
)
def test_damage_beside_the_statistics_costs_no_export(
    whole: Path, run: Path, tmp_path: Path, name: str
) -> None:
    flip(run / name)
    done = export(run, tmp_path / "fp8", "fp8")
    assert done.exit_code == 0, done.stderr
    assert "damaged" in done.stderr
    checkpoint = (tmp_path / "fp8/model.safetensors").read_bytes()
    assert checkpoint == (whole.parent / "fp8/model.safetensors").read_bytes()


def test_one_damaged_solution_is_the_one_that_is_made_again(
    demo: Path, whole: Path, run: Path, tmp_path: Path
) -> None:
    (group,) = (run / "calibration.zarr/solutions").glob("awq*/2")
    name = next(path for path in sorted(group.rglob("c*")) if path.is_file())
    flip(name)
    times = {path: path.stat().st_mtime_ns for path in group.parent.rglob("c*") if path.is_file()}
    assert export(run, tmp_path / "fp8", "fp8").exit_code == 0
    refused = export(run, tmp_path / "awq", "nvfp4_awq_lite")
    assert refused.exit_code == 4
    said = "holds none for 1 layers (2), where they are damaged; make them with: holdfast calibrate"
    assert said in refused.stderr
    done = calibrate(demo, run)
    assert done.exit_code == 0, done.stderr
    assert "for layer 2 is lost, and nothing else" in done.stderr and "set aside in" in done.stderr
    assert stored(run) == stored(whole)
    untouched = {path for path in times if path.parents[1] != group}
    assert {path: path.stat().st_mtime_ns for path in untouched} == {path: times[path] for path in untouched}
    assert export(run, tmp_path / "awq", "nvfp4_awq_lite").exit_code == 0


def test_lost_statistics_are_made_again_and_solutions_stay(demo: Path, whole: Path, run: Path) -> None:
    flip(next((run / "calibration.zarr/g000004/amax/lm_head.input").glob("c*")))
    done = calibrate(demo, run)
    assert done.exit_code == 0, done.stderr
    assert "fell back to commit 3" in done.stderr
    assert stored(run) == stored(whole)
    assert [len(layers) for layers in solutions(open_run(run).head.objects).values()] == [4]
    assert runner.invoke(app, ["check", str(run)]).exit_code == 0


def test_tokens_are_written_again(demo: Path, whole: Path, run: Path) -> None:
    flip(run / "calibration.zarr/tokens/c.0.0")
    done = calibrate(demo, run)
    assert done.exit_code == 0, done.stderr
    assert stored(run) == stored(whole)
    assert runner.invoke(app, ["check", str(run)]).exit_code == 0


def test_lost_heads_exit_4_from_every_command_that_needs_them(demo: Path, run: Path, tmp_path: Path) -> None:
    (run / "HEAD").unlink()
    shutil.rmtree(run / "heads")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for ended in (calibrate(demo, run), export(run, tmp_path / "fp8", "fp8")):
        assert (ended.exit_code, f"holdfast repair {run}" in ended.stderr) == (4, True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_someone_else_s_folder_is_refused_by_name(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine"
    (run / "activations").mkdir(parents=True)
    (run / "activations/trace.bin").write_bytes(b"mine")
    (run / "run.json").write_text("mine")
    refused = calibrate(demo, run)
    assert (refused.exit_code, "holds other files (activations)" in refused.stderr) == (2, True)
    assert (run / "activations/trace.bin").read_bytes() == b"mine"
    assert (run / "run.json").read_text() == "mine"
