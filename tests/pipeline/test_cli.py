"""The command line: its help, its settings, and how it ends. No stage does any work here."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app
from stages.settings import CalibrateSettings, ExportSettings, QuantizeSettings, VerifySettings

runner = CliRunner(env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"})


def plain(text: str) -> str:
    """Help text without the line breaks and frames of its layout."""
    return re.sub(r"[\s│]+", " ", text)


@pytest.mark.parametrize(
    "command", [[], ["quantize"], ["calibrate"], ["export"], ["verify"], ["status"]], ids=str
)
def test_help_teaches_the_exit_codes(command: list[str]) -> None:
    shown = runner.invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    for code in (
        "0 done",
        "2 something given",
        "3 stored work",
        "4 a stored object is damaged",
        "75 stopped",
    ):
        assert code in plain(shown.output)


def test_help_has_examples_and_policies() -> None:
    calibrate = plain(runner.invoke(app, ["calibrate", "--help"]).output)
    assert "holdfast calibrate Qwen/Qwen3-30B-A3B chats.jsonl runs/qwen3" in calibrate
    quantize = plain(runner.invoke(app, ["quantize", "--help"]).output)
    assert "holdfast quantize Qwen/Qwen3-30B-A3B chats.jsonl exports/qwen3-nvfp4" in quantize
    assert "without it, OUT-run beside OUT" in quantize
    export = plain(runner.invoke(app, ["export", "--help"]).output)
    assert "holdfast export runs/qwen3 exports/qwen3-fp8 --recipe fp8" in export
    for choices in ("layer|weights-only|error", "max|error", "floor|error", "layer|expert"):
        assert choices in export


def test_nothing_typed_shows_help() -> None:
    shown = runner.invoke(app, [])
    for command in ("quantize", "calibrate", "export"):
        assert re.search(rf"^│ {command} +\w", shown.output, re.MULTILINE), command


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("quantize", QuantizeSettings),
        ("calibrate", CalibrateSettings),
        ("export", ExportSettings),
        ("verify", VerifySettings),
    ],
)
def test_every_setting_is_an_option_with_the_same_default(name: str, settings: type[BaseModel]) -> None:
    parameters = {parameter.name: parameter for parameter in get_command(app).commands[name].params}  # type: ignore[attr-defined]
    assert set(parameters) - {"debug", "help"} == set(settings.model_fields)
    for field, declared in settings.model_fields.items():
        if not declared.is_required():
            assert parameters[field].default == declared.default, field


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "samples = 0: input should be greater than 0"),
        (["--seq", "-5"], "seq = -5: input should be greater than 0"),
        (["--commit-every", "0"], "commit-every = 0.0: input should be greater than 0"),
        (
            ["--stop-after", "soon"],
            "stop-after = 'soon': value error, a time such as 90, 90s, 45m, 3h55m or 1d is needed",
        ),
        (
            ["--stop-after", "0"],
            "stop-after = '0': value error, a time such as 90, 90s, 45m, 3h55m or 1d is needed",
        ),
        (
            ["--column", "\udcff"],
            "column = '\\udcff': value error, this is not utf-8; rename it, or give a link to it",
        ),
    ],
)
def test_impossible_settings_exit_2(arguments: list[str], message: str) -> None:
    ended = runner.invoke(app, ["calibrate", "model", "data", "run", *arguments])
    assert (ended.exit_code, ended.stderr) == (2, f"holdfast: {message}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "model"],
        ["export", "run", "out", "--unseen", "zero"],
        ["quantize", "model", "data", "out", "--partial"],
        ["calibrate", "m", "d", "r", "--batch", "x"],
    ],
    ids=str,
)
def test_a_mistyped_command_exits_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    "option", [o for o, f in CalibrateSettings.model_fields.items() if not f.is_required()]
)
def test_a_value_of_the_wrong_type_is_one_clear_error(option: str) -> None:
    """What a newcomer types: words for numbers, and names that are none of the choices."""
    kind = CalibrateSettings.model_fields[option].annotation
    wrong = {int: "many", float: "often"}.get(kind, "wrong")  # type: ignore[arg-type]
    flag = f"--{option.replace('_', '-')}"
    ended = runner.invoke(app, ["calibrate", "/none/model", "/none/text.jsonl", "/dev/null/run", flag, wrong])
    assert ended.exit_code == 2
    assert "Traceback" not in ended.output
    assert ended.stderr.strip() != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/none", "{data}", "{run}"], "there is no folder /none; MODEL is"),
        (["{data}", "{data}", "{run}"], "there is no folder {data}; MODEL is"),
        (["{run}", "{data}", "{run}2"], "there is no folder {run}; MODEL is"),
        (["{folder}", "{data}", "{run}"], "{folder} has neither model.safetensors nor"),
        (["{folder}", "{data}", "{data}"], "{data} is a file. Choose another name for the run."),
        (["{folder}", "{data}", "/dev/null/run"], "/dev/null"),
        (["", "{data}", "{run}"], "neither model.safetensors nor"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {name: str(tmp_path / name) for name in ("run", "data", "folder")}
    (tmp_path / "folder").mkdir()
    (tmp_path / "data").write_text("text\n")
    ended = runner.invoke(app, ["calibrate", *(argument.format(**places) for argument in arguments)])
    assert ended.exit_code == 2
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("holdfast: ") and message.format(**places) in said
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_status_of_no_run_exits_2_in_one_line(tmp_path: Path) -> None:
    ended = runner.invoke(app, ["status", str(tmp_path / "none")])
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"holdfast: {tmp_path / 'none'} is not a run")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_status_of_a_damaged_run_exits_4(tmp_path: Path) -> None:
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "000001.json").write_text(json.dumps({"number": 1}))
    (tmp_path / "HEAD").write_text("heads/000001.json xxh3:0\n")
    ended = runner.invoke(app, ["status", str(tmp_path)])
    assert ended.exit_code == 4
    assert "000001.json" in ended.stderr
