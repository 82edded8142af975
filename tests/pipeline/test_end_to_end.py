"""The road of a person who types the two commands, and is interrupted."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from safetensors import safe_open
from typer.testing import CliRunner

from pipeline.cli import app
from state.reader import open_run

runner = CliRunner(env={"COLUMNS": "200"})

SIZES = ["--samples", "16", "--seq", "64", "--batch", "2", "--commit-every", "0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("road")


def calibrate(demo: Path, run: Path, *options: str) -> Result:
    data = str(demo / "text.jsonl")
    return runner.invoke(app, ["calibrate", str(demo / "model"), data, str(run), *SIZES, *options])


@pytest.fixture
def stopped_by_sigterm(folder: Path) -> Iterator[None]:
    """Sends this process SIGTERM as soon as the run exists; one that comes too late does nothing."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def wait_and_send() -> None:
        while not (folder / "run" / "HEAD").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    yield
    thread.join()
    signal.signal(signal.SIGTERM, before)


def test_1_a_stop_is_committed(demo: Path, folder: Path, stopped_by_sigterm: None) -> None:
    stopped = calibrate(demo, folder / "run")
    assert stopped.exit_code == 75, stopped.stderr
    assert "stopped by SIGTERM" in stopped.stderr
    assert "the same command goes on" in stopped.stderr


def test_2_an_unfinished_run_is_not_exported(folder: Path) -> None:
    refused = runner.invoke(app, ["export", str(folder / "run"), str(folder / "out")])
    assert refused.exit_code == 2
    assert "unfinished" in refused.stderr
    assert "--partial" in refused.stderr


def test_3_the_same_command_goes_on(demo: Path, folder: Path) -> None:
    done = calibrate(demo, folder / "run")
    assert done.exit_code == 0, done.stderr
    assert f"holdfast export {folder / 'run'} exports/run-nvfp4" in done.stdout
    assert "model.layers.1.mlp.experts.5" in done.stdout
    assert calibrate(demo, folder / "whole").exit_code == 0
    resumed, whole = open_run(folder / "run").generation(), open_run(folder / "whole").generation()
    assert resumed.arrays.keys() == whole.arrays.keys()
    for name, values in whole.arrays.items():
        assert resumed.arrays[name].tobytes() == values.tobytes(), name


def test_4_a_finished_run_does_nothing(demo: Path, folder: Path) -> None:
    head = (folder / "run" / "HEAD").read_bytes()
    done = calibrate(demo, folder / "run")
    assert done.exit_code == 0, done.stderr
    assert "was finished before" in done.stdout
    assert (folder / "run" / "HEAD").read_bytes() == head


def test_5_other_settings_are_refused_by_name(demo: Path, folder: Path) -> None:
    refused = calibrate(demo, folder / "run", "--samples", "8")
    assert refused.exit_code == 3
    assert "tokens" in refused.stderr
    assert calibrate(demo, folder / "run", "--resume", "never").exit_code == 2
    assert calibrate(demo, folder / "nowhere", "--resume", "required").exit_code == 2
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(("recipe", "dtype"), [("nvfp4", "U8"), ("fp8", "F8_E4M3")])
def test_6_one_run_gives_both_formats(folder: Path, recipe: str, dtype: str) -> None:
    out = folder / recipe
    done = runner.invoke(app, ["export", str(folder / "run"), str(out), "--recipe", recipe])
    assert done.exit_code == 0, done.stderr
    assert "1 written, 0 kept" in done.stdout
    assert f"unseen=layer: see {out / 'export_report.json'}" in done.stdout
    assert "policy unseen=layer acted on 3 quantizers" in done.stderr
    with safe_open(out / "model.safetensors", framework="numpy") as checkpoint:
        packed = checkpoint.get_slice("model.layers.0.mlp.experts.3.down_proj.weight")
        assert packed.get_dtype() == dtype
    again = runner.invoke(app, ["export", str(folder / "run"), str(out), "--recipe", recipe])
    assert again.exit_code == 0
    assert "was finished before" in again.stdout


def test_7_another_export_in_the_same_folder_needs_overwrite(folder: Path) -> None:
    command = ["export", str(folder / "run"), str(folder / "fp8"), "--recipe", "nvfp4"]
    refused = runner.invoke(app, command)
    assert refused.exit_code == 3
    assert "--overwrite" in refused.stderr
    assert re.search(r"  recipe: stored fp8 \(xxh3:\w{32}\), now nvfp4 \(xxh3:\w{32}\)\n", refused.stderr)
    assert runner.invoke(app, [*command, "--overwrite"]).exit_code == 0


def test_8_status_of_the_finished_run(folder: Path) -> None:
    shown = runner.invoke(app, ["status", str(folder / "run")])
    assert shown.exit_code == 0
    assert "8 of 8" in shown.stdout
    assert "1,024 of 1,024" in shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "nvfp5"], "nvfp5"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    demo: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    refused = calibrate(demo, tmp_path / "run", *options)
    assert refused.exit_code == 2
    assert message in refused.stderr.splitlines()[-1]
    assert refused.stderr.splitlines()[-1].startswith("holdfast: ")
    assert not (tmp_path / "run").exists()


def test_one_command_for_both_stages(demo: Path, folder: Path) -> None:
    """Here with the run that is there: what both tables say, and how it ends."""
    command = ["quantize", str(demo / "model"), str(demo / "text.jsonl"), str(folder / "one"), *SIZES]
    command += ["--run", str(folder / "run")]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows[0] == "run" and rows.index("checkpoint") > rows.index("sites") and rows[-1] == "took"
    assert "next" not in rows
    assert "(was finished before)" in done.stdout.splitlines()[0]
    refused = runner.invoke(app, [*command, "--recipe", "fp8"])
    assert refused.exit_code == 3
    assert re.search(r"  recipe: stored nvfp4 \(xxh3:\w{32}\), now fp8 \(xxh3:\w{32}\)\n", refused.stderr)
    stopped = runner.invoke(
        app, [*command, "--overwrite", "--unseen", "weights-only", "--stop-after", "0.01"]
    )
    assert stopped.exit_code == 75
    assert "the same command goes on from there: holdfast quantize " in stopped.stderr.splitlines()[-1]


def test_a_missing_model_or_text_exits_2(demo: Path, tmp_path: Path) -> None:
    text = str(demo / "text.jsonl")
    refused = runner.invoke(app, ["calibrate", str(tmp_path / "model"), text, str(tmp_path / "run")])
    assert (refused.exit_code, "Traceback" in refused.stderr) == (2, False)
    missing = str(tmp_path / "none.jsonl")
    refused = runner.invoke(app, ["calibrate", str(demo / "model"), missing, str(tmp_path / "run")])
    assert (refused.exit_code, "none.jsonl: no such file" in refused.stderr) == (2, True)
    assert not (tmp_path / "run").exists()


def test_9_the_readme_s_programs_run(
    demo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(programs) == 3
    (folder / "demo").symlink_to(demo)
    monkeypatch.chdir(folder)
    for program in programs:
        exec(program.replace("runs/demo", "run"), {})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "('layer', 'expert', 'channel') (4, 32, 64)"
    assert float(shown[1]) > 0
    assert (folder / "exports/small-fp8/config.json").exists()
