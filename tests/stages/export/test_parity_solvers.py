"""Parity with modelopt's exporter where channels are scaled: SmoothQuant, and AWQ with modelopt's own scales.

AWQ's scales are compared under `--fold none`. modelopt finds one scale per linear and, when it exports,
averages them over linears that read one tensor, rounding twice on the way; here both sides get the average.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.dequantize import weight_of
from stages.export.run import export
from stages.fold.folds import FoldSite
from stages.formats import NVFP4
from stages.formats.quantized import round_to_nearest
from stages.recipe.recipes import resolve
from stages.settings import ExportSettings
from state.errors import InputError
from state.reader import open_run
from tests.stages.export import support
from tests.stages.export.solving import hand_solve, open_model, random_scales, write_solutions
from tests.stages.export.test_parity import assert_parity, rewrite
from tests.stages.export.test_solutions import write_recipe

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def make(scratch: Path, text: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    model = support.make_model(scratch / "model", support.config_of(family, **changes))
    return model, support.make_run(scratch / "run", model, text)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_smoothquant(family: str, tmp_path: Path, text: Path) -> None:
    ours, _ = assert_parity(*make(tmp_path, text, family), "int8_smoothquant", tmp_path)
    smoothed = [name for name in support.tensors(ours) if name.endswith(".pre_quant_scale")]
    assert len(smoothed) == (8 if family == "qwen3_moe" else 14)


def test_smoothquant_of_a_trained_mixture(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "code-moe"
    run = support.make_run(tmp_path / "run", model, shared / "data" / "code.jsonl", samples=16, seq=256)
    assert_parity(model, run, "int8_smoothquant", tmp_path)


def test_smoothquant_with_a_dead_channel(tmp_path: Path, text: Path) -> None:
    support.make_model(tmp_path / "model", support.config_of("llama"))

    def kill(name: str, tensor: Tensor) -> Tensor:
        if name == "model.layers.0.input_layernorm.weight":
            tensor[3] = 0
        return tensor

    rewrite(tmp_path / "model", kill)
    run = support.make_run(tmp_path / "run", tmp_path / "model", text)
    ours, _ = assert_parity(tmp_path / "model", run, "int8_smoothquant", tmp_path)
    scale = load_file(ours / "model.safetensors")["model.layers.0.self_attn.q_proj.pre_quant_scale"]
    assert scale[3] == 1e4  # not masked: modelopt masks only beside a scale that vanishes


def test_smoothquant_that_looks_at_the_weights(tmp_path: Path, text: Path) -> None:
    half = "{method: smoothquant, alpha: 0.5}"
    recipe = write_recipe(tmp_path / "half.yaml", half, "int8_per_channel", "int8")
    model, run = make(tmp_path, text, "llama")
    export(ExportSettings(run=run, out=tmp_path / "ours", recipe=recipe))
    support.exported_by_modelopt(support.quantized_by_modelopt(model, run, recipe), tmp_path / "theirs")
    found = support.differing(support.tensors(tmp_path / "ours"), support.tensors(tmp_path / "theirs"))
    assert found
    assert not {name for name in found if "o_proj" in name or "down_proj" in name}  # these share no input
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    q, k, v = (tensors[f"model.layers.0.self_attn.{leaf}_proj.pre_quant_scale"] for leaf in "qkv")
    assert q.equal(k) and q.equal(v)


@pytest.mark.parametrize("recipe", ["int8", "general/ptq/int4_blockwise_weight_only"])
def test_int8_and_int4_without_a_solver(recipe: str, tmp_path: Path, text: Path) -> None:
    assert_parity(*make(tmp_path, text, "llama", **WIDE), recipe, tmp_path)


@pytest.mark.parametrize("recipe", ["int4_awq", "w4a8_awq_beta"])
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 4), ("qwen3", 2)])
def test_awq_with_modelopts_own_scales(
    recipe: str, family: str, kv_heads: int, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = make(tmp_path, text, family, **WIDE, num_key_value_heads=kv_heads)
    with smoothing(monkeypatch, lambda _, found: found) as found:
        by_name = names_of(support.quantized_by_modelopt(model, run, recipe), found)
    hand = open_model(model, run, resolve(recipe))
    scales = {name: shared_scale(site, by_name) for name, site in hand.folds.sites.items()}
    given = {
        part.module: 1.0 / site.expand(scales[name])
        for name, site in hand.folds.sites.items()
        for part in site.consumers
    }
    order = iter([given[name] for name in by_name])
    with smoothing(monkeypatch, lambda *_: next(order)):
        support.exported_by_modelopt(support.quantized_by_modelopt(model, run, recipe), tmp_path / "theirs")

    fields = {(name, "scale"): scale for name, scale in scales.items()}
    fields |= {(module, "weight_amax"): torch.tensor(1.0) for module in hand.quantizers.weights}
    write_solutions(run, tmp_path / "solved", hand.solver.id, fields, {"policies": [], "kept_at_one": {}})
    export(ExportSettings(run=tmp_path / "solved", out=tmp_path / "ours", recipe=recipe, fold="none"))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert support.differing(support.tensors(ours), support.tensors(theirs)) == {}
    for name in ("config.json", "hf_quant_config.json"):
        assert support.parsed(ours / name) == support.parsed(theirs / name)
    stored = {name.split("layers.0.")[1] for name in support.tensors(ours) if "layers.0." in name}
    assert {name for name in stored if name.endswith("pre_quant_scale")} == {
        "self_attn.o_proj.pre_quant_scale",
        "mlp.down_proj.pre_quant_scale",
    }


@contextmanager
def smoothing(
    monkeypatch: pytest.MonkeyPatch, choose: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Collect the float32 scale that modelopt gives every linear, or have it use another."""
    from modelopt.torch.quantization import model_calib

    original = model_calib.apply_pre_quant_scale_and_smooth
    found: list[tuple[nn.Module, Tensor]] = []

    def apply(linear: nn.Module, scale: Tensor) -> None:
        found.append((linear, scale.clone()))
        original(linear, choose(linear, scale))

    with monkeypatch.context() as patched:
        patched.setattr(model_calib, "apply_pre_quant_scale_and_smooth", apply)
        yield found


def names_of(model: nn.Module, found: list[tuple[nn.Module, Tensor]]) -> dict[str, Tensor]:
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(linear)]: scale for linear, scale in found}


def shared_scale(site: FoldSite, by_name: dict[str, Tensor]) -> Tensor:
    """One scale per free channel on the consumers' side, the mean over linears and over tied columns."""
    columns = torch.stack([1.0 / by_name[part.module] for part in site.consumers]).mean(0)
    entries = site.entries()
    return torch.zeros(site.channels).index_add_(0, entries, columns) / torch.bincount(entries)


class TestNvfp4KeptApart:
    """modelopt folds o into v and down into up as well for this format; here both stay apart."""

    @pytest.fixture
    def exported(self, tmp_path: Path, text: Path) -> Path:
        model, run = make(tmp_path, text, "qwen3_moe")
        solved = hand_solve(model, run, tmp_path / "solved", resolve("nvfp4_awq_lite"))
        settings = ExportSettings(run=solved.run, out=tmp_path / "out", recipe="nvfp4_awq_lite", fold="none")
        assert export(settings).solver is not None
        return tmp_path

    def test_vectors_are_stored_where_the_norm_does_not_take_them(self, exported: Path) -> None:
        tensors = load_file(exported / "out" / "model.safetensors")
        stored = {
            name.split("layers.1.")[1] for name in tensors if "layers.1" in name and "pre_quant" in name
        }
        experts = {
            f"mlp.experts.{number}.{leaf}_proj.pre_quant_scale"
            for number in range(4)
            for leaf in ("gate", "up", "down")
        }
        assert stored == experts | {"self_attn.o_proj.pre_quant_scale"}
        quantization = support.parsed(exported / "out" / "hf_quant_config.json")["quantization"]
        assert quantization["quant_algo"] == "NVFP4_AWQ" and quantization["pre_quant_scale"] is True

    def test_weights_are_multiplied_and_nothing_else_is(self, exported: Path) -> None:
        tensors, source = (load_file(exported / folder / "model.safetensors") for folder in ("out", "model"))
        scales = random_scales(open_model(exported / "model", exported / "run", resolve("nvfp4_awq_lite")))
        expert = "model.layers.0.mlp.experts.3"
        vector = 1.0 / scales[f"{expert}.up_proj"]
        scaled = (source[f"{expert}.down_proj.weight"] * (1.0 / vector)).bfloat16()
        assert weight_of(tensors, f"{expert}.down_proj").equal(round_to_nearest(NVFP4, scaled).dequantize())
        assert tensors[f"{expert}.down_proj.pre_quant_scale"].equal(vector.bfloat16())
        name = "model.layers.0.post_attention_layernorm.weight"
        assert tensors[name].equal(source[name])
        router = "model.layers.0.mlp.gate.weight"
        assert tensors[router].equal(source[router])


def test_folded_int4_says_that_nothing_is_left_to_apply(tmp_path: Path, text: Path) -> None:
    model, run = make(tmp_path, text, "llama", **WIDE)
    solved = hand_solve(model, run, tmp_path / "solved", resolve("int4_awq"))
    export(ExportSettings(run=solved.run, out=tmp_path / "out", recipe="int4_awq"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for module, expected in solved.weights.items():
        assert weight_of(tensors, module).equal(expected), module
    assert not [name for name in tensors if "pre_quant_scale" in name]
    quantization = support.parsed(tmp_path / "out" / "hf_quant_config.json")["quantization"]
    assert quantization["quant_algo"] == "W4A16_AWQ" and quantization["pre_quant_scale"] is False


def test_smoothquant_needs_every_channel(tmp_path: Path, text: Path) -> None:
    from stages.capture import capture

    model, run = make(tmp_path, text, "llama")
    calibrated = support.quantized_by_modelopt(model, run, "fp8")
    captured = capture(calibrated, str(model), tmp_path / "captured", "fp8")
    assert open_run(captured).amax("model.layers.0.self_attn.q_proj").shape == ()
    with pytest.raises(InputError, match="one amax for all channels"):
        export(ExportSettings(run=captured, out=tmp_path / "out", recipe="int8_smoothquant"))
