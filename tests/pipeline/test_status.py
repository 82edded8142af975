"""What `holdfast status` says of runs with known statistics."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.status import look, print_status
from stages.calibrate.summary import Coverage
from stages.settings import CalibrateSettings
from state.claim import create_run
from state.head import Cursor
from state.identity import Environment, Identity, tokens_digest
from state.layout import Layout, SiteArray
from state.reader import open_run
from state.record import RunRecord, SourceDescription
from state.store import RunWriter
from state.update import Generation, Solution, Update

TOKENS = np.arange(40, dtype=np.int32).reshape(5, 8)
EXPERTS = SiteArray(
    pattern="model.layers.L.mlp.experts.E.up_proj",
    role="input",
    layers=(1,),
    experts=3,
    channels=2,
    statistics=("amax", "tokens"),
)
GENERATION = Generation(
    Layout(arrays=(EXPERTS,)),
    {
        f"amax/{EXPERTS.key}": np.array([[[np.nan, np.nan], [1, 0], [2, 3]]], dtype=np.float32),
        f"tokens/{EXPERTS.key}": np.array([[0, 5, 100]], dtype=np.int64),
    },
)


def make_run(path: Path, *updates: Update) -> Path:
    """A run of five windows in batches of two, with these commits."""
    settings = CalibrateSettings(model="org/model", data="text.txt", run=path, samples=5, seq=8, batch=2)
    record = RunRecord(
        settings=settings.model_dump(mode="json"),
        identity=Identity(
            tensors={}, config={}, tokenizer={}, tokens=tokens_digest(TOKENS), statistics=("amax", "tokens")
        ),
        environment=Environment(
            torch="2",
            transformers="5",
            modelopt="0",
            device="cpu",
            experts="eager",
            dtype="f",
            batch=2,
            threads=1,
        ),
        source=SourceDescription(model="org/model"),
        generator={"holdfast": "0"},
    )
    with create_run(path, record, TOKENS) as writer:
        for update in updates:
            writer.commit(update)
    return path


def test_before_the_first_statistics(tmp_path: Path) -> None:
    status = look(make_run(tmp_path / "run"))
    assert (status.finished, status.batches, status.tokens, status.generation) == (
        False,
        (0, 3),
        (0, 40),
        None,
    )
    assert (status.coverage, status.last_event) == (Coverage(), "created")


def test_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", Update(Cursor(batch=2), finished=False, generation=GENERATION))
    status = look(run)
    assert (status.finished, status.batches, status.tokens) == (False, (2, 3), (32, 40))
    assert (status.commit, status.generation, status.last_event) == (1, "g000001", "committed")
    assert status.coverage == Coverage(
        sites=3,
        experts=3,
        unseen=("model.layers.1.mlp.experts.0",),
        few=("model.layers.1.mlp.experts.1",),
        dead_channels=1,
    )
    assert status.commit_age is not None
    assert status.next_command == f"holdfast calibrate org/model text.txt {run} --samples 5 --seq 8 --batch 2"


def test_a_run_that_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", Update(Cursor(batch=2), finished=False, generation=GENERATION))
    run.rename(tmp_path / "moved")
    monkeypatch.setenv("HOME", str(tmp_path))
    status = look(Path("~/moved"))
    assert (status.run, status.batches) == (str(tmp_path / "moved"), (2, 3))
    assert f"text.txt {tmp_path / 'moved'} --samples" in status.next_command


def test_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solved = Solution("gptq-0123", 0, {"model.layers.0.up@scale": np.ones(2, dtype=np.float32)}, {})
    update = Update(Cursor(layer=1), finished=False, generation=GENERATION, solutions=(solved,))
    status = look(make_run(tmp_path / "run", update))
    assert (status.layers, status.solutions) == ((1, 2), {"gptq-0123": (1, 2)})
    print_status(status, as_json=False)
    printed = capsys.readouterr().out
    assert "1 of 2" in printed and "gptq-0123: 1 of 2 layers" in printed
    assert "batches" not in printed and "without tokens" not in printed


def test_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", Update(Cursor(batch=3), finished=True, generation=GENERATION))
    status = look(run)
    assert (status.finished, status.batches, status.tokens) == (True, (3, 3), (40, 40))
    assert status.next_command == f"holdfast export {run} exports/run-nvfp4"


def test_while_a_writer_holds_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with RunWriter.resume(run) as writer:
        writer.commit(Update(Cursor(batch=1), finished=False, generation=GENERATION))
        assert look(run).batches == (1, 3)
        writer.commit(Update(Cursor(batch=2), finished=False, generation=GENERATION))
        assert look(run).batches == (2, 3)


def test_a_commit_collected_while_it_is_read_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", Update(Cursor(batch=1), finished=False, generation=GENERATION))

    def open_stale(path: Path, verify: bool) -> object:
        monkeypatch.setattr("pipeline.status.open_run", open_run)
        stale = open_run(path, verify=verify)
        with RunWriter.resume(path) as writer:
            for batch in (2, 3):
                writer.commit(Update(Cursor(batch=batch), finished=batch == 3, generation=GENERATION))
        return stale

    monkeypatch.setattr("pipeline.status.open_run", open_stale)
    assert look(run).batches == (3, 3)


def test_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", Update(Cursor(batch=2), finished=False, generation=GENERATION))
    print_status(look(run), as_json=False)
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["batches"] == "2 of 3"
    assert rows["tokens"] == "32 of 40"
    assert rows["commit"].startswith("1 (g000001), ")
    print_status(look(run), as_json=True)
    assert json.loads(capsys.readouterr().out)["tokens"] == [32, 40]
