"""What a person sees of a verification."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.verify import print_verification
from stages.engines import ENGINES
from stages.engines.findings import Finding
from stages.verify.report import VerifyReport
from state.errors import InputError

runner = CliRunner(env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"})


def report(*findings: Finding, refused: str = "") -> VerifyReport:
    engines = {engine: [refused] if refused and engine == "trtllm" else [] for engine in ENGINES}
    return VerifyReport("any", "NVFP4", "FP8", {"NVFP4": 32}, engines, 117, 4096, findings, ("the rest",))


def test_a_whole_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    print_verification(report(refused="does not load NVFP4"), Path("out"))
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "checkpoint       out (NVFP4, KV cache FP8)",
        "stored as NVFP4  32",
        "read             117 tensors, 4.1 kB",
        "vLLM             loads it",
        "SGLang           loads it",
        "TensorRT-LLM     does not load NVFP4",
        "left out         the rest",
        "nothing is wrong with out",
    ]


def test_what_is_wrong_is_named_and_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    many = [Finding("missing-tensor", f"experts.{n}", "is gone", ("vllm",)) for n in range(12)]
    with pytest.raises(
        InputError, match=r"13 things are wrong: missing-tensor \(12\), config \(1\); all of them are in"
    ):
        print_verification(report(*many, Finding("config", "config.json", "is [missing]")), Path("out"))
    shown = capsys.readouterr().out
    assert "experts.9" in shown and "experts.10" not in shown and "2 more" in shown
    assert "is [missing]" in shown  # no markup
    assert "SGLang           reads it wrongly, or not at all: see below" in shown


def test_no_checkpoint_is_exit_2(tmp_path: Path) -> None:
    ran = runner.invoke(app, ["verify", str(tmp_path / "nowhere")])
    assert ran.exit_code == 2
    assert "there is no folder" in ran.stderr


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    ran = runner.invoke(app, ["verify", str(tmp_path)])
    assert ran.exit_code == 2
    assert "quant_method 'compressed-tensors'" in ran.stderr
    assert not (tmp_path / "verify_report.json").exists()
