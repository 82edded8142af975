"""Parity with modelopt's exporter for the formats that need nothing of a run, and for several in one."""

from pathlib import Path

import pytest

from stages.export.run import export
from stages.settings import ExportSettings
from tests.stages.export import support
from tests.stages.export.test_parity import assert_parity

WIDE = {"hidden_size": 256, "intermediate_size": 192, "head_dim": 32, "moe_intermediate_size": 256}
RECIPES = (
    "w4a16_nvfp4",
    "mxfp4",
    "mxfp8",
    "fp8_per_channel_per_token",
    "fp8_2d_blockwise_weight_only",
    "general/ptq/mxfp4_mlp_weight_only",
    "general/ptq/nvfp4_mlp_weight_only",
    "general/ptq/nvfp4_weight_only-kv_fp16",
)
MIXED = """
imports:
  fp8: configs/numerics/fp8
  mxfp8: configs/numerics/mxfp8
  nvfp4: configs/numerics/nvfp4
metadata: {recipe_type: ptq}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*layers.0.self_attn.[qkv]_proj.weight_quantizer', cfg: {$import: fp8, axis: 0}}
    - quantizer_name: '*layers.0.self_attn.[qkv]_proj.input_quantizer'
      cfg: {$import: fp8, type: dynamic, block_sizes: {-1: }}
    - quantizer_name: '*layers.1.self_attn.[qkv]_proj.weight_quantizer'
      cfg: {$import: fp8, block_sizes: {-1: 128, -2: 128}}
    - {quantizer_name: '*o_proj.weight_quantizer', cfg: {$import: mxfp8}}
    - {quantizer_name: '*o_proj.input_quantizer', cfg: {$import: mxfp8}}
    - {quantizer_name: '*layers.0.mlp*weight_quantizer*', cfg: {$import: nvfp4}}
    - {quantizer_name: '*layers.0.mlp*input_quantizer', cfg: {$import: nvfp4}}
    - {quantizer_name: '*layers.1.mlp*weight_quantizer*', cfg: {$import: nvfp4}}
    - {quantizer_name: '*mlp.gate.*', enable: false}
"""


CACHE = """
imports:
  base_disable_all: configs/ptq/units/base_disable_all
  experts: configs/ptq/units/w8a8_fp8_fp8
  cache: configs/ptq/units/kv_nvfp4
  default_disabled_quantizers: configs/ptq/units/default_disabled_quantizers
metadata: {recipe_type: ptq}
quantize:
  algorithm: max
  quant_cfg:
    - $import: base_disable_all
    - $import: experts
    - $import: cache
    - $import: default_disabled_quantizers
"""


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, run) of each family."""
    scratch = tmp_path_factory.mktemp(request.param)
    model = support.make_model(scratch / "model", support.config_of(request.param, **WIDE))
    text = support.make_text(scratch / "text.jsonl")
    return model, support.make_run(scratch / "run", model, text)


@pytest.mark.parametrize("recipe", RECIPES)
def test_formats_that_need_nothing_of_inputs(
    calibrated: tuple[Path, Path], recipe: str, tmp_path: Path
) -> None:
    ours, _ = assert_parity(*calibrated, recipe, tmp_path)
    assert not [name for name in support.tensors(ours) if name.endswith("input_scale")]


def test_several_formats_in_one(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(MIXED)
    ours, _ = assert_parity(*calibrated, str(tmp_path / "mixed.yaml"), tmp_path)
    quantization = support.parsed(ours / "hf_quant_config.json")["quantization"]
    inline = support.parsed(ours / "config.json")["quantization_config"]
    assert quantization["quant_algo"] == inline["quant_algo"] == "MIXED_PRECISION"
    layers = quantization["quantized_layers"]
    assert layers == inline["quantized_layers"]
    assert {entry["quant_algo"] for entry in layers.values()} == {
        "FP8_PER_CHANNEL_PER_TOKEN",
        "fp8_pb_wo",
        "MXFP8",
        "NVFP4",
        "W4A16_NVFP4",
    }
    grouped = {name for group in inline["config_groups"].values() for name in group["targets"]}
    assert grouped == layers.keys()


def test_a_cache_in_nvfp4(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "cache.yaml").write_text(CACHE)
    ours, _ = assert_parity(*calibrated, str(tmp_path / "cache.yaml"), tmp_path)
    assert len([name for name in support.tensors(ours) if name.endswith(("k_scale", "v_scale"))]) == 4
    inline = support.parsed(ours / "config.json")["quantization_config"]
    assert inline["kv_cache_scheme"] == "NVFP4"
    assert support.parsed(ours / "export_report.json")["formats"]["nvfp4 kv cache"] == 2


@pytest.mark.parametrize("several", [False, True])
def test_embeddings_stay_as_they_are(calibrated: tuple[Path, Path], tmp_path: Path, several: bool) -> None:
    rule = "    - {quantizer_name: '*embed_tokens.weight_quantizer', cfg: {$import: nvfp4}}\n"
    one = MIXED[: MIXED.index("    - {quantizer_name: '*layers.0.self_attn")]
    one += "    - {quantizer_name: '*layers.1.mlp*proj*weight_quantizer*', cfg: {$import: nvfp4}}\n"
    (tmp_path / "own.yaml").write_text((MIXED if several else one) + rule)
    export(ExportSettings(run=calibrated[1], out=tmp_path / "out", recipe=str(tmp_path / "own.yaml")))
    name = "model.embed_tokens"
    source = support.tensors(calibrated[0])[f"{name}.weight"]
    assert support.tensors(tmp_path / "out")[f"{name}.weight"] == source
    assert support.parsed(tmp_path / "out" / "export_report.json")["left_out"][name]
    quantization = support.parsed(tmp_path / "out" / "hf_quant_config.json")["quantization"]
    if several:
        assert name not in quantization["quantized_layers"]
    else:
        assert quantization["quant_algo"] == "W4A16_NVFP4" and name in quantization["exclude_modules"]
