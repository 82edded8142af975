"""Whole comparisons of tiny models: against transformers' own loss, and of damaged checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from stages.engines.files import read_files
from stages.engines.modules import take_stock
from stages.export.run import export
from stages.measure import run
from stages.measure.presented import present
from stages.measure.run import measure
from stages.model.dequantize.source import open_source
from stages.model.skeleton import Skeleton, load_config
from stages.progress import Silent
from stages.settings import ExportSettings, VerifySettings
from stages.verify.run import verify
from state.errors import InputError
from tests.stages.export import support
from tests.stages.verify.editable import Editable, damaged
from tests.stages.verify.edits import times
from tests.stages.verify.mutations import LEFT_TO_NUMBERS

KV = "general/ptq/nvfp4_default-kv_fp8"
SEQ = 16


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of two kinds, each with exports, and text."""
    folder = tmp_path_factory.mktemp("measured")
    text = support.make_text(folder / "text.jsonl")
    for family in ("qwen3_moe", "llama"):
        tied = {"tie_word_embeddings": True} if family == "llama" else {}
        support.make_model(folder / family / "model", support.config_of(family, **tied))
        support.make_run(folder / family / "run", folder / family / "model", text, samples=8)
        for recipe in (KV, "fp8", "int8_smoothquant"):
            out = folder / family / recipe.replace("/", "-")
            export(ExportSettings(run=folder / family / "run", out=out, recipe=recipe), Silent())
    return folder


def asked(scene: Path, family: str, out: Path, **more: object) -> VerifySettings:
    given = {"model": str(scene / family / "model"), "data": str(scene / "text.jsonl"), "out": out}
    return VerifySettings.model_validate(given | {"numeric": True, "samples": 6, "seq": SEQ} | more)


def presented(scene: Path, family: str, out: Path) -> dict[str, Tensor]:
    folder = scene / family / "model"
    source, files = open_source(folder), read_files(out)
    skeleton = Skeleton(load_config(folder), source.tensors)
    assert files.source is not None and files.stated is not None
    shown = present(files.source, take_stock(files.source.tensors, files.stated), source, skeleton)
    return {name: shown.value(name) for name in shown.tensors}


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
@pytest.mark.parametrize("recipe", [KV.replace("/", "-"), "fp8"])
def test_the_losses_are_transformers_own(
    scene: Path, monkeypatch: pytest.MonkeyPatch, family: str, recipe: str
) -> None:
    """Without rounding of inputs, since nothing else rounds them so."""
    monkeypatch.setattr(run, "rounding", lambda *_: None)
    monkeypatch.setattr(run, "_kv_scales", lambda *_: {})
    seen: list[Tensor] = []
    whole = run.compare
    monkeypatch.setattr(run, "compare", lambda *args: seen.extend(args[2]) or whole(*args))
    out = scene / family / recipe
    found = measure(asked(scene, family, out), Silent())
    model = AutoModelForCausalLM.from_pretrained(scene / family / "model").eval()
    windows = torch.cat(seen)
    for loss, weights in ((found.source_loss, None), (found.loss, presented(scene, family, out))):
        if weights is not None:
            weights_file = scene / family / "dequantized"
            weights_file.mkdir(exist_ok=True)
            model = loaded(weights, scene / family / "model", weights_file)
        with torch.inference_mode():
            logits = model(windows, use_cache=False).logits[:, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert loss == pytest.approx(expected.item(), abs=1e-3)


def loaded(weights: dict[str, Tensor], model: Path, out: Path) -> torch.nn.Module:
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous().clone() for name, value in weights.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text((model / "config.json").read_text())
    found: torch.nn.Module = AutoModelForCausalLM.from_pretrained(out).eval()
    return found


def test_numbers_of_a_good_checkpoint(scene: Path, tmp_path: Path) -> None:
    kept = {}
    for recipe in ("fp8", KV.replace("/", "-")):
        found = kept[recipe] = measure(asked(scene, "qwen3_moe", scene / "qwen3_moe" / recipe), Silent())
        assert (found.windows, found.tokens, len(found.layers), len(found.worst)) == (6, 6 * (SEQ - 1), 2, 10)
        assert found.left_out == ()
        assert 0 < found.kl < 1 and 0 < found.agreement <= 1
        assert all(0 < error < 1 for error in found.layers)
    fp8, nvfp4 = kept.values()
    assert fp8.kl < nvfp4.kl
    assert fp8.layers[0] < nvfp4.layers[0]
    assert max(fp8.worst.values()) < 0.04 < max(nvfp4.worst.values()) < 0.15


@pytest.mark.parametrize("name", LEFT_TO_NUMBERS)
def test_what_only_numbers_can_tell(scene: Path, tmp_path: Path, name: str) -> None:
    good = scene / "qwen3_moe" / KV.replace("/", "-")
    out = damaged(good, tmp_path / "out", LEFT_TO_NUMBERS[name])
    before, after = (measure(asked(scene, "qwen3_moe", folder), Silent()) for folder in (good, out))
    assert after.layers[0] == before.layers[0]
    assert after.layers[1] > before.layers[1]


def test_inputs_that_are_cut_off_cost_much(scene: Path, tmp_path: Path) -> None:
    good = scene / "qwen3_moe" / "fp8"
    edit = times("model.layers.1.self_attn.o_proj.input_scale", factor=1 / 448)
    out = damaged(good, tmp_path / "out", edit)
    before, after = (measure(asked(scene, "qwen3_moe", folder), Silent()) for folder in (good, out))
    assert after.layers[1] > 1.5 * before.layers[1]
    assert after.kl > before.kl


class TestTheReport:
    def test_it_has_the_numbers(self, scene: Path, tmp_path: Path) -> None:
        out = damaged(scene / "llama" / "fp8", tmp_path / "out", lambda content: None)
        report = verify(asked(scene, "llama", out, max_loss_increase=5.0), Silent(), measure)
        assert report.findings == () and report.numbers is not None
        written = json.loads((out / "verify_report.json").read_text())["numeric"]
        assert written["increase"] == pytest.approx(written["loss"] - written["source_loss"])
        assert str(tmp_path) not in (out / "verify_report.json").read_text()

    def test_a_loss_past_the_limit_is_a_finding(self, scene: Path, tmp_path: Path) -> None:
        out = damaged(scene / "llama" / "fp8", tmp_path / "out", lambda content: None)
        report = verify(asked(scene, "llama", out, max_loss_increase=-1.0), Silent(), measure)
        assert [finding.rule for finding in report.findings] == ["loss-increase"]
        assert all(report.loads(engine) for engine in report.engines)

    def test_what_computes_nothing_has_no_numbers(self, scene: Path, tmp_path: Path) -> None:
        def edit(content: Editable) -> None:
            content.drop("model.norm.weight")

        report = verify(
            asked(scene, "llama", damaged(scene / "llama" / "fp8", tmp_path / "out", edit)), Silent(), measure
        )
        assert report.numbers is None
        assert any("lacks model.norm.weight" in words for words in report.left_out)
        assert {"missing-tensor", "source-dropped"} <= {finding.rule for finding in report.findings}


@pytest.mark.parametrize(("given", "lacking"), [({"model": None}, "--model"), ({"data": None}, "--data")])
def test_without_a_model_or_text_it_is_refused(
    scene: Path, given: dict[str, None], lacking: str, call: Callable[..., object] = verify
) -> None:
    with pytest.raises(InputError, match=f"--numeric needs {lacking}"):
        call(asked(scene, "llama", scene / "llama" / "fp8", **given), Silent(), measure)
