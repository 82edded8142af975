"""`holdfast recipes`: what is printed, and what a model changes."""

import json
from pathlib import Path

import pytest

from pipeline.recipes import STOOD_IN, look_through, print_recipes
from stages.progress import Silent
from stages.recipe.survey import Surveyed
from tests.stages.export import support

FOUND = [
    Surveyed(
        "nvfp4", needs="channel statistics", bits={"nvfp4": 4.5}, cache="fp8", scales="mse", stood_in=("*a",)
    ),
    Surveyed("svd", "recipe 'svd' asks for the algorithm 'svd'; supported: max"),
    Surveyed("both", bits={"fp8": 8.0, "mxfp4": 4.25}, solver="gptq", left_out={"wte": "why"}),
]


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(FOUND, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "recipe   bits per weight    KV cache  scales or solver  needs of a run",
        "nvfp4 *  nvfp4 4.5          fp8       mse               channel statistics",
        "both     fp8 8, mxfp4 4.25  -         gptq              nothing",
        STOOD_IN,
        "both: not quantized: wte (why)",
        "",
        "not served, 1 of 3:",
        "  svd: asks for the algorithm 'svd'",
    ]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(FOUND, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [one["served"] for one in found] == [True, False, True]
    assert found[1]["reason"] == "recipe 'svd' asks for the algorithm 'svd'; supported: max"
    assert found[2]["bits"] == {"fp8": 8.0, "mxfp4": 4.25}


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 columns, which INT4's blocks of 128 do not divide.
    model = support.make_model(tmp_path / "model", support.config_of("llama"))
    monkeypatch.setattr("stages.recipe.recipes.shipped", lambda: ["nvfp4", "int4_awq"])
    nvfp4, int4 = look_through(str(model), Silent())
    assert nvfp4.served and not int4.served
    assert int4.reason is not None and "which int4_awq blocks of 128 do not divide" in int4.reason
    assert all(one.served for one in look_through(None, Silent()))
