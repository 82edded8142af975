"""What can't be done is refused by name before there is a run, with a way out that is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.gptj import modeling_gptj

from stages.calibrate.run import calibrate
from stages.progress import Silent
from state.errors import InputError
from tests.families.dense import gemma2, llama
from tests.families.layout import Family
from tests.families.tokenizer import write_text, write_tokenizer
from tests.families.write import write_family
from tests.stages.calibrate import runs

KV = "general/ptq/nvfp4_default-kv_fp8"


def written(folder: Path, family: Family, **config: Any) -> Path:
    """The inputs of a calibration: a family's folder and a text. config: keys of its config.json."""
    write_family(family, folder / "model")
    change(folder, **config)
    write_text(folder / "text.jsonl")
    return folder


def change(folder: Path, **config: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def refused(folder: Path, match: str, **more: Any) -> None:
    with pytest.raises(InputError, match=match):
        calibrate(runs.settings(folder, folder / "run", samples=4, **more), Silent())
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("recipe", "blocks"), [("nvfp4", 16), ("int4_awq", 128), ("nvfp4_awq_full", 16)])
def test_widths_that_blocks_do_not_divide(tmp_path: Path, recipe: str, blocks: int) -> None:
    folder = written(tmp_path, llama(), intermediate_size=72)
    weights = load_file(folder / "model" / "model.safetensors")
    for name, value in weights.items():
        if ".mlp." in name:
            down = name.endswith("down_proj.weight")
            weights[name] = (value[:, :72] if down else value[:72]).contiguous()
    save_file(weights, folder / "model" / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj" if blocks == 128 else "model.layers.0.mlp.down_proj"
    width = 64 if blocks == 128 else 72
    refused(folder, rf"{module}\.weight has {width} input channels, which .* of {blocks}", recipe=recipe)


def test_a_tied_head_that_the_recipe_quantizes(tmp_path: Path) -> None:
    folder = written(tmp_path, gemma2())
    own = tmp_path / "all.yaml"
    own.write_text(
        "metadata: {recipe_type: ptq}\n"
        "quantize:\n  algorithm: max\n  quant_cfg:\n"
        "    - {quantizer_name: '*', enable: false}\n"
        "    - {quantizer_name: '*weight_quantizer', cfg: {num_bits: e4m3}}\n"
    )
    refused(folder, r"quantizes lm_head\.weight, which the source checkpoint does not hold", recipe=str(own))


def test_a_vocabulary_smaller_than_the_tokenizers_ids(tmp_path: Path) -> None:
    folder = written(tmp_path, llama(), vocab_size=40)
    weights = load_file(folder / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:40].clone()
    save_file(weights, folder / "model" / "model.safetensors")
    refused(folder, r"makes token \d+, and model\.embed_tokens knows 40 tokens")


@pytest.mark.skipif(
    hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"),
    reason="GPT-J takes its attention from there",
)
def test_keys_and_values_outside_the_registry(tmp_path: Path) -> None:
    """GPT-J computes attention by itself; every recipe without a KV cache is served."""
    config = AutoConfig.for_model(
        "gptj", vocab_size=512, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, bos_token_id=1, eos_token_id=2
    )
    config.architectures = ["GPTJForCausalLM"]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    write_text(tmp_path / "text.jsonl")
    refused(
        tmp_path,
        r"quantizes the KV cache of transformer\.h\.0\.attn, which computes attention outside .* \(2 such\)",
        recipe=KV,
    )


def test_a_solver_without_layers_is_never_told_to_take_the_whole_model(tmp_path: Path) -> None:
    folder = written(tmp_path, llama())
    weights = load_file(folder / "model" / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, folder / "model" / "model.safetensors")
    missing = r"no hub tensor fills model\.layers\.1\.input_layernorm\.weight\. "
    solved = missing + "Recipe 'nvfp4_awq_clip' is solved layer by layer: choose one without a solver"
    for schedule in ("whole", "layerwise", "auto"):
        refused(folder, solved, recipe="nvfp4_awq_clip", schedule=schedule)


def test_a_class_that_can_t_compute_beside_what_it_keeps_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSeek-V4's in some releases. In float32 it can."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["up_proj"])
    folder = written(tmp_path, llama())
    refused(folder, r"LlamaForCausalLM of .* can't compute in bfloat16 beside .*give --dtype float32")
    calibrate(runs.settings(folder, folder / "run", samples=4, dtype="float32"), Silent())


def test_own_code_without_consent(tmp_path: Path) -> None:
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = written(tmp_path, llama(), model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    refused(folder, "model brings Python code of its own; look at it, then allow it with --trust-remote-code")


def test_the_tokenizers_own_code_without_consent(tmp_path: Path) -> None:
    folder = written(tmp_path, llama())
    path = folder / "model" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(content))
    refused(folder, "model brings Python code of its own; look at it, then allow it with --trust-remote-code")
