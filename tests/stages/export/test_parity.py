"""Parity with modelopt's `export_hf_checkpoint`: tensor names, dtypes, shapes, bytes, and parsed JSON.

docs/parity.md lists the differences of choice; each has a test here that says which tensors or files, and
why.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.export.run import export
from stages.settings import ExportSettings
from tests.stages.export import support

RECIPES = ("nvfp4", "fp8", "general/ptq/nvfp4_default-kv_fp8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.make_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path
) -> tuple[Path, Path]:
    """(model folder, run) of each family."""
    scratch = tmp_path_factory.mktemp(request.param)
    model = support.make_model(scratch / "model", support.config_of(request.param))
    return model, support.make_run(scratch / "run", model, text)


def assert_parity(model: Path, run: Path, recipe: str, scratch: Path) -> tuple[Path, Path]:
    ours, theirs = scratch / "ours", scratch / "theirs"
    export(ExportSettings(run=run, out=ours, recipe=recipe))
    support.exported_by_modelopt(support.quantized_by_modelopt(model, run, recipe), theirs)
    assert support.differing(support.tensors(ours), support.tensors(theirs)) == {}
    for name in ("config.json", "hf_quant_config.json"):
        assert support.parsed(ours / name) == support.parsed(theirs / name)
    return ours, theirs


@pytest.mark.parametrize("recipe", RECIPES)
def test_random_models(calibrated: tuple[Path, Path], recipe: str, tmp_path: Path) -> None:
    ours, theirs = assert_parity(*calibrated, recipe, tmp_path)
    assert support.parsed(ours / "generation_config.json") == support.parsed(
        theirs / "generation_config.json"
    )


@pytest.fixture(scope="module")
def code_moe(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model = shared / "models" / "code-moe"
    run = tmp_path_factory.mktemp("code-moe") / "run"
    return model, support.make_run(run, model, shared / "data" / "code.jsonl", samples=16, seq=256)


@pytest.mark.parametrize("recipe", RECIPES)
def test_code_moe(code_moe: tuple[Path, Path], recipe: str, tmp_path: Path) -> None:
    assert_parity(*code_moe, recipe, tmp_path)


class TestDifferencesOfChoice:
    """Everything else is equal in each of these cases, too."""

    @pytest.fixture
    def scratch(self, tmp_path: Path) -> Path:
        support.make_model(tmp_path / "model", support.config_of("llama"))
        return tmp_path

    def both(self, scratch: Path, text: Path, recipe: str) -> tuple[dict[str, str], dict[str, str]]:
        model, ours, theirs = scratch / "model", scratch / "ours", scratch / "theirs"
        run = support.make_run(scratch / "run", model, text)
        export(ExportSettings(run=run, out=ours, recipe=recipe))
        support.exported_by_modelopt(support.quantized_by_modelopt(model, run, recipe), theirs)
        return support.tensors(ours), support.tensors(theirs)

    def test_tokenizer_report_and_records_are_added(self, scratch: Path, text: Path) -> None:
        self.both(scratch, text, "fp8")
        ours, theirs = ({path.name for path in (scratch / side).iterdir()} for side in ("ours", "theirs"))
        assert theirs - ours == set()
        assert ours - theirs == {
            "tokenizer.json",
            "tokenizer_config.json",
            "export_report.json",
            "holdfast_export.json",
            "holdfast_journal.jsonl",
        }
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (scratch / "ours" / name).read_bytes() == (scratch / "model" / name).read_bytes()

    def test_config_json_is_the_source_s_own(self, scratch: Path, text: Path) -> None:
        path = scratch / "model" / "config.json"
        stored = support.parsed(path) | {"rope_theta": 50000.0, "torch_dtype": "float32", "of_ours": [1]}
        del stored["rope_parameters"], stored["dtype"]
        path.write_text(json.dumps(stored))
        self.both(scratch, text, "fp8")
        ours, theirs = (support.parsed(scratch / side / "config.json") for side in ("ours", "theirs"))
        assert ours == stored | {"quantization_config": theirs["quantization_config"]}
        assert "rope_theta" not in theirs and theirs["rope_parameters"]["rope_theta"] == 50000.0

    def test_generation_config_is_carried_unchanged(self, scratch: Path, text: Path) -> None:
        stored = {"do_sample": False, "top_k": 5, "eos_token_id": 0}
        (scratch / "model" / "generation_config.json").write_text(json.dumps(stored))
        self.both(scratch, text, "fp8")
        assert support.parsed(scratch / "ours" / "generation_config.json") == stored
        assert support.parsed(scratch / "theirs" / "generation_config.json")["do_sample"] is True

    def test_no_generation_config_is_made_up(self, scratch: Path, text: Path) -> None:
        (scratch / "model" / "generation_config.json").unlink()
        self.both(scratch, text, "fp8")
        assert not (scratch / "ours" / "generation_config.json").exists()
        assert (scratch / "theirs" / "generation_config.json").exists()

    def test_unquantized_tensors_keep_the_dtype_of_the_source(self, scratch: Path, text: Path) -> None:
        def widen(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.float() if name == "model.norm.weight" or "q_proj" in name else tensor

        rewrite(scratch / "model", widen)
        ours, theirs = self.both(scratch, text, "nvfp4")
        found = support.differing(ours, theirs)
        assert found.keys() == {"model.norm.weight"}
        assert [value.split("[")[0] for value in found["model.norm.weight"] if value] == ["F32", "BF16"]

    @pytest.mark.parametrize("cache", ["fp8", "nvfp4"])
    def test_cast_recipes_get_unit_cache_scales(self, scratch: Path, text: Path, cache: str) -> None:
        ours, theirs = self.both(scratch, text, f"general/ptq/nvfp4_default-kv_{cache}_cast")
        names = [
            f"model.layers.{n}.self_attn.{part}"
            for n in (0, 1)
            for part in ("k_proj.k_scale", "v_proj.v_scale")
        ]
        assert support.differing(ours, theirs).keys() == set(names)
        assert {name: scalar(scratch / "ours", name) for name in names} == dict.fromkeys(names, 1.0)
        assert not theirs.keys() & set(names)

    def test_a_dead_input_gets_unit_amax(self, scratch: Path, text: Path) -> None:
        # With V all zeros the attention's output is zero. modelopt puts the format's largest value, 6, for
        # its amax.
        rewrite(
            scratch / "model",
            lambda name, tensor: tensor * 0 if "layers.1.self_attn.v_proj" in name else tensor,
        )
        ours, theirs = self.both(scratch, text, "nvfp4")
        name = "model.layers.1.self_attn.o_proj.input_scale"
        assert support.differing(ours, theirs).keys() == {name}
        assert scalar(scratch / "ours", name) == pytest.approx(1 / 2688)
        assert scalar(scratch / "theirs", name) == pytest.approx(6 / 2688)

    def test_a_weight_of_zeros_gets_unit_amax(self, scratch: Path, text: Path) -> None:
        # modelopt divides by its amax: a scale of zero and a weight of NaN.
        rewrite(
            scratch / "model",
            lambda name, tensor: tensor * 0 if "layers.1.self_attn.o_proj" in name else tensor,
        )
        ours, theirs = self.both(scratch, text, "fp8")
        module = "model.layers.1.self_attn.o_proj"
        assert support.differing(ours, theirs).keys() == {f"{module}.weight", f"{module}.weight_scale"}
        assert scalar(scratch / "ours", f"{module}.weight_scale") == pytest.approx(1 / 448)
        assert scalar(scratch / "theirs", f"{module}.weight_scale") == 0.0
        with safe_open(scratch / "ours" / "model.safetensors", "pt") as file:
            assert file.get_tensor(f"{module}.weight").float().abs().max().item() == 0.0

    def test_tensors_the_model_does_not_load_pass_through(self, scratch: Path, text: Path) -> None:
        path = scratch / "model" / "model.safetensors"
        content = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8.0)}
        save_file(content, path, metadata={"format": "pt"})
        ours, theirs = self.both(scratch, text, "fp8")
        assert support.differing(ours, theirs).keys() == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
        assert "model.layers.0.self_attn.rotary_emb.inv_freq" in ours

    def test_a_tied_copy_that_the_source_stores_is_kept(self, tmp_path: Path, text: Path) -> None:
        model = support.make_model(tmp_path / "model", support.config_of("llama", tie_word_embeddings=True))
        path = model / "model.safetensors"
        content = load_file(path)
        save_file(
            content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}, path, {"format": "pt"}
        )
        ours, theirs = self.both(tmp_path, text, "nvfp4")
        assert support.differing(ours, theirs).keys() == {"lm_head.weight"}
        assert ours["lm_head.weight"] == ours["model.embed_tokens.weight"]


def test_tied_embeddings_stored_once(tmp_path: Path, text: Path) -> None:
    model = support.make_model(tmp_path / "model", support.config_of("llama", tie_word_embeddings=True))
    assert_parity(model, support.make_run(tmp_path / "run", model, text), "nvfp4", tmp_path)


def test_experts_kept_apart_change_their_input_scales_only(tmp_path: Path, text: Path) -> None:
    model = support.make_model(tmp_path / "model", support.config_of("qwen3_moe"))
    run = support.make_run(tmp_path / "run", model, text)
    export(ExportSettings(run=run, out=tmp_path / "layer", recipe="nvfp4"))
    export(ExportSettings(run=run, out=tmp_path / "expert", recipe="nvfp4", expert_input_scale="expert"))
    found = support.differing(support.tensors(tmp_path / "layer"), support.tensors(tmp_path / "expert"))
    assert found and all(".experts." in name and name.endswith(".input_scale") for name in found)
    for layer in range(2):
        for expert in range(4):
            gate, up = (
                f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.input_scale"
                for leaf in ("gate_proj", "up_proj")
            )
            assert scalar(tmp_path / "expert", gate) == scalar(tmp_path / "expert", up)
            assert scalar(tmp_path / "expert", gate) <= scalar(tmp_path / "layer", gate)


def rewrite(model: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = model / "model.safetensors"
    save_file(
        {name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )


def scalar(folder: Path, name: str) -> float:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return float(file.get_tensor(name))
