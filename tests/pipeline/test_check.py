"""`holdfast check` and `holdfast repair`, as a person types them."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from state.store import RunWriter
from state.update import Update
from tests.state import driver

runner = CliRunner(env={"COLUMNS": "200"})

SOLUTION = "calibration.zarr/solutions/awq-test/2/scale/c.0"
STATISTICS = "calibration.zarr/g000003/amax/lm_head.input/c.0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("state.durable.os.fsync", lambda descriptor: None)
    driver.drive(tmp_path / "run")
    return tmp_path / "run"


def test_a_whole_run_exits_0(run: Path) -> None:
    checked = runner.invoke(app, ["check", str(run)])
    assert checked.exit_code == 0, checked.stderr
    assert f"{run} (whole)" in checked.stdout and "3 (g000003)" in checked.stdout
    repaired = runner.invoke(app, ["repair", str(run)])
    assert repaired.exit_code == 0
    assert "all is whole; nothing was changed" in repaired.stdout


def test_damage_exits_4_with_its_name_and_the_next_command(run: Path) -> None:
    (run / SOLUTION).write_bytes(b"x")
    checked = runner.invoke(app, ["check", str(run)])
    assert checked.exit_code == 4
    assert SOLUTION in checked.stderr and f"type: holdfast repair {run}" in checked.stderr
    assert "the solution of awq-test for layer 2 is lost, and nothing else" in checked.stdout
    repaired = runner.invoke(app, ["repair", str(run)])
    assert repaired.exit_code == 0, repaired.stderr
    assert "the solution of awq-test for layer 2 is lost, and nothing else" in repaired.stdout
    assert f"set aside in {run / 'set-aside'}" in repaired.stdout
    assert f"holdfast calibrate MODEL DATA {run}" in repaired.stdout
    assert runner.invoke(app, ["check", str(run)]).exit_code == 0


def test_lost_statistics_are_said_with_the_command_that_makes_them_again(run: Path) -> None:
    (run / STATISTICS).unlink()
    assert runner.invoke(app, ["check", str(run)]).exit_code == 4
    repaired = runner.invoke(app, ["repair", str(run)])
    assert repaired.exit_code == 0
    assert "fell back to commit 2" in repaired.stdout and "(unfinished)" in repaired.stdout
    assert f"holdfast calibrate MODEL DATA {run}" in repaired.stdout


def test_lost_heads_exit_4_and_are_made_again(run: Path) -> None:
    (run / "HEAD").unlink()
    shutil.rmtree(run / "heads")
    for command in ("status", "check"):
        lost = runner.invoke(app, [command, str(run)])
        assert (lost.exit_code, f"holdfast repair {run}" in lost.stderr) == (4, True)
    repaired = runner.invoke(app, ["repair", str(run)])
    assert repaired.exit_code == 0 and "heads/000003.json was made again" in repaired.stdout
    for command in ("status", "check"):
        assert runner.invoke(app, [command, str(run)]).exit_code == 0


def test_damaged_tokens_stay_damage_until_calibrating(run: Path) -> None:
    (run / "calibration.zarr/tokens/c.0.0").unlink()
    repaired = runner.invoke(app, ["repair", str(run)])
    assert repaired.exit_code == 4
    assert "tokens/c.0.0 stays damaged. Statistics can be exported" in repaired.stderr
    assert runner.invoke(app, ["status", str(run)]).exit_code == 0


def test_what_can_not_be_read_now_exits_2(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.durable.PAUSES", ())
    whole = Path.read_bytes

    def failing(path: Path) -> bytes:
        if str(path).endswith(SOLUTION):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    checked = runner.invoke(app, ["check", str(run)])
    assert checked.exit_code == 2
    assert f"{SOLUTION}; try again" in checked.stderr and "Input/output error" in checked.stdout


def test_what_is_no_run_exits_2(tmp_path: Path) -> None:
    for command in ("check", "repair"):
        assert runner.invoke(app, [command, str(tmp_path)]).exit_code == 2


def test_both_are_refused_or_work_while_a_writer_holds_the_run(run: Path) -> None:
    with RunWriter.resume(run) as writer:
        writer.commit(Update(writer.head.cursor, True))
        assert runner.invoke(app, ["check", str(run)]).exit_code == 0
        busy = runner.invoke(app, ["repair", str(run)])
    assert (busy.exit_code, "is being written by" in busy.stderr) == (2, True)


def test_a_head_that_leads_elsewhere_is_named(run: Path) -> None:
    head = json.loads((run / "heads/000003.json").read_text())
    assert head["generation"] == "g000003"
    from state.head import Cursor, Head

    forged = Head.of(3, Cursor(), True, "../../victim", (), head["objects"])
    (run / "heads/000003.json").write_bytes(forged.encode())
    (run / "HEAD").write_bytes(forged.pointer)
    for command in ("check", "repair", "status"):
        refused = runner.invoke(app, [command, str(run)])
        assert (refused.exit_code, "'../../victim'" in refused.stderr) == (4, True), command
