"""modelopt's recipes read off as plain data, in hub names."""

from pathlib import Path

import pytest

from stages.formats import (
    FP8_PB_WO,
    FP8_PC_PT,
    INT4_AWQ,
    INT8_SQ,
    MXFP4,
    MXFP8,
    NVFP4,
    W4A8_AWQ,
    W4A16_NVFP4,
    WeightFormat,
)
from stages.model.skeleton import Skeleton, load_config
from stages.recipe.hub_config import in_hub_names
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import resolve
from state.errors import InputError
from state.source import Source
from tests.families.newest import minimax_m3
from tests.families.write import write_family
from tests.stages.calibrate import families
from tests.stages.export import support

EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    folder = support.make_model(tmp_path_factory.mktemp("model"), support.config_of("qwen3_moe"))
    return Skeleton(load_config(folder), Source.open(folder).tensors)


def test_preset(skeleton: Skeleton) -> None:
    plan = plan_quantizers(skeleton, resolve("nvfp4"))
    attention = {f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in (0, 1) for leaf in "qkvo"}
    experts = {
        f"model.layers.{layer}.mlp.experts.{number}.{leaf}"
        for layer in (0, 1)
        for number in range(4)
        for leaf in EXPERT_LEAVES
    }
    assert plan.weights == dict.fromkeys(attention | experts, NVFP4)
    assert plan.inputs.keys() == attention | experts
    assert plan.inputs["model.layers.0.mlp.experts.3.up_proj"] == (
        "model.layers.0.mlp.experts.gate_up_proj_input_quantizer"
    )
    assert plan.fused_experts == experts
    assert plan.kv == {}
    assert plan.hf_quant_config["quantization"]["quant_algo"] == "NVFP4"
    assert "lm_head" in plan.hf_quant_config["quantization"]["exclude_modules"]


def test_recipe_file_with_a_cache(skeleton: Skeleton) -> None:
    plan = plan_quantizers(skeleton, resolve("general/ptq/nvfp4_experts_only-kv_fp8"))
    assert {name.rpartition(".")[2] for name in plan.weights} == set(EXPERT_LEAVES)
    assert plan.kv == {"model.layers.0.self_attn": "fp8", "model.layers.1.self_attn": "fp8"}


def test_caches_of_several_formats_are_refused(skeleton: Skeleton, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("""
imports: {fp8: configs/numerics/fp8, nvfp4: configs/numerics/nvfp4}
metadata: {recipe_type: ptq}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*layers.0*[kv]_bmm_quantizer', cfg: {$import: fp8}}
    - {quantizer_name: '*layers.1*[kv]_bmm_quantizer', cfg: {$import: nvfp4}}
""")
    with pytest.raises(InputError, match="puts KV caches into fp8 and nvfp4"):
        plan_quantizers(skeleton, resolve(str(tmp_path / "own.yaml")))


def test_values_a_recipe_fixes(skeleton: Skeleton) -> None:
    plan = plan_quantizers(skeleton, resolve("general/ptq/nvfp4_experts_only_input_scale1-kv_fp8_cast"))
    assert set(plan.constant_inputs.values()) == {2688.0}
    assert plan.constant_inputs.keys() == plan.inputs.keys()
    assert set(plan.kv.values()) == {"fp8_cast"}


@pytest.mark.parametrize(
    ("recipe", "weight", "inputs"),
    [
        ("nvfp4_awq_full", NVFP4, True),
        ("general/ptq/nvfp4_default-kv_none-gptq", NVFP4, True),
        ("nvfp4_w4a4_weight_local_hessian", NVFP4, True),
        ("int4_awq", INT4_AWQ, False),
        ("w4a8_awq_beta", W4A8_AWQ, True),
        ("int8_smoothquant", INT8_SQ, True),
    ],
)
def test_recipes_with_a_solver(skeleton: Skeleton, recipe: str, weight: WeightFormat, inputs: bool) -> None:
    plan = plan_quantizers(skeleton, resolve(recipe))
    assert len(plan.weights) == 32 and set(plan.weights.values()) == {weight}
    assert plan.inputs.keys() == (plan.weights.keys() if inputs else set())


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("nvfp4_svdquant", "'svdquant'"),
        ("int8_weight_only", "'int8_wo'"),
        ("w4a8_nvfp4_fp8", "'w4a8_nvfp4_fp8'"),
        ("mxfp6", "num_bits=(3, 2)"),
        ("nvfp4_fp8_mha", "model.layers.0.self_attn.p_bmm_quantizer"),
    ],
)
def test_what_is_not_supported_is_named(skeleton: Skeleton, recipe: str, named: str) -> None:
    with pytest.raises(InputError) as error:
        plan_quantizers(skeleton, resolve(recipe))
    assert named in str(error.value) and recipe in str(error.value) and "supported: " in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "weight"),
    [
        ("w4a16_nvfp4", W4A16_NVFP4),
        ("mxfp4", MXFP4),
        ("mxfp8", MXFP8),
        ("fp8_per_channel_per_token", FP8_PC_PT),
        ("fp8_2d_blockwise_weight_only", FP8_PB_WO),
    ],
)
def test_formats_that_need_nothing_of_inputs(skeleton: Skeleton, recipe: str, weight: WeightFormat) -> None:
    plan = plan_quantizers(skeleton, resolve(recipe))
    assert len(plan.weights) == 32 and set(plan.weights.values()) == {weight}
    assert not plan.inputs


STATIC = "num_bits: e2m1, block_sizes: {-1: 16, type: static, scale_bits: e4m3}"


def test_experts_of_several_formats_are_refused(skeleton: Skeleton, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"""
metadata: {{recipe_type: ptq}}
quantize:
  algorithm: max
  quant_cfg:
    - {{quantizer_name: '*', enable: false}}
    - {{quantizer_name: '*gate_up_proj_weight_quantizer*', cfg: {{num_bits: e4m3}}}}
    - {{quantizer_name: '*down_proj_weight_quantizer*', cfg: {{{STATIC}}}}}
""")
    with pytest.raises(InputError, match=r"projections of model.layers.0.mlp.experts to fp8 and w4a16_nvfp4"):
        plan_quantizers(skeleton, resolve(str(tmp_path / "own.yaml")))


@pytest.mark.parametrize(
    ("weight", "inputs", "named"),
    [
        ("num_bits: e4m3, block_sizes: {-1: 128}", None, "'fp8_pb_wo with block_sizes={-1: 128}'"),
        ("num_bits: e4m3, block_sizes: {-1: 128, -2: 64}", None, "'fp8_pb_wo with block_sizes="),
        ("num_bits: e4m3, axis: 0", "num_bits: e4m3", "layers.0.mlp.experts.down_proj_input_quantizer"),
        ("num_bits: e4m3", "num_bits: e4m3, type: dynamic", "mlp.experts.down_proj_input_quantizer"),
        ("num_bits: e4m3, block_sizes: {-1: 128, -2: 128}", "num_bits: e4m3", "down_proj_input_quantizer"),
        ("num_bits: e4m3", "num_bits: 8", "mlp.experts.down_proj_input_quantizer"),
        (STATIC, "num_bits: e4m3", "mlp.experts.down_proj_input_quantizer"),
    ],
)
def test_blocks_and_inputs_that_a_format_does_not_have(
    skeleton: Skeleton, tmp_path: Path, weight: str, inputs: str | None, named: str
) -> None:
    rules = ["{quantizer_name: '*', enable: false}"]
    rules.append(f"{{quantizer_name: '*down_proj_weight_quantizer*', cfg: {{{weight}}}}}")
    if inputs is not None:
        rules.append(f"{{quantizer_name: '*down_proj_input_quantizer', cfg: {{{inputs}}}}}")
    head = "metadata: {recipe_type: ptq}\nquantize:\n  algorithm: max\n  quant_cfg:\n"
    (tmp_path / "own.yaml").write_text(head + "".join(f"    - {rule}\n" for rule in rules))
    with pytest.raises(InputError) as error:
        plan_quantizers(skeleton, resolve(str(tmp_path / "own.yaml")))
    assert named in str(error.value)


def test_every_name_of_a_hub_checkpoint_with_other_names(tmp_path: Path) -> None:
    """Mixtral: `block_sparse_moe` and w1, w3, w2 on the hub, `mlp.experts.gate_up_proj` in memory."""
    from transformers import MixtralConfig

    sizes = support.SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = support.make_model(tmp_path, MixtralConfig(architectures=["MixtralForCausalLM"], **sizes))
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    plan = plan_quantizers(skeleton, resolve("nvfp4"))
    experts = {name for name in plan.weights if "experts" in name}
    assert experts == {
        f"model.layers.{layer}.block_sparse_moe.experts.{number}.{leaf}"
        for layer in (0, 1)
        for number in range(4)
        for leaf in ("w1", "w2", "w3")
    }
    assert skeleton.experts[0].up == ("w1", "w3") and skeleton.experts[0].down == "w2"
    excluded = plan.hf_quant_config["quantization"]["exclude_modules"]
    assert "model.layers.0.block_sparse_moe.gate" in excluded


def test_experts_that_the_hub_stores_fused_are_named_one_by_one(tmp_path: Path) -> None:
    folder = families.save_tiny("gemma4_moe", tmp_path / "model")
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    plan = plan_quantizers(skeleton, resolve("fp8"))
    (experts, *_) = skeleton.experts
    expected = {f"{experts.hub}.{number}.{leaf}" for number in range(experts.count) for leaf in EXPERT_LEAVES}
    assert expected <= plan.weights.keys() & plan.inputs.keys() & plan.fused_experts
    up = skeleton.matrix(f"{experts.hub}.1.up_proj")
    assert (up.tensor, up.expert) == (f"{experts.hub}.gate_up_proj", 1)
    assert (up.first, up.stride, up.count) == (experts.intermediate, 1, experts.intermediate)


def test_experts_that_modelopt_keeps_in_one_tensor(tmp_path: Path) -> None:
    folder = families.save_tiny("gpt_oss", tmp_path / "model")
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    plan = plan_quantizers(skeleton, resolve("fp8"))
    experts = "model.layers.0.mlp.experts"
    assert plan.together[f"{experts}.5.up_proj"] == f"{experts}.gate_up_proj"
    assert plan.inputs[f"{experts}.5.down_proj"] == f"{experts}.down_proj_input_quantizer"
    assert plan.together.keys() == plan.fused_experts and len(plan.together) == 4 * 6 * 3
    assert plan.output(f"{experts}.5.up_proj", "weight") == f"{experts}.gate_up_proj"
    assert plan.output(f"{experts}.5.up_proj", "input_scale") == f"{experts}.gate_up_proj_input_scale"
    assert (
        plan.output("model.layers.0.self_attn.q_proj", "weight") == "model.layers.0.self_attn.q_proj.weight"
    )


def test_llama_4_is_served_outside_the_registry(tmp_path: Path) -> None:
    folder = families.save_tiny("llama4", tmp_path / "model")
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    plan = plan_quantizers(skeleton, resolve("nvfp4"))
    (experts, *_) = skeleton.experts
    assert plan.together[f"{experts.hub}.2.gate_proj"] == f"{experts.hub}.gate_up_proj"
    up = skeleton.matrix(f"{experts.hub}.1.up_proj")
    assert (up.expert, up.transposed, up.first, up.stride) == (1, True, experts.intermediate, 1)


def test_formats_without_a_layout_for_such_experts_are_refused(tmp_path: Path) -> None:
    folder = families.save_tiny("gpt_oss", tmp_path / "model")
    skeleton = Skeleton(load_config(folder), Source.open(folder).tensors)
    with pytest.raises(
        InputError, match=r"experts to int8_sq, and modelopt keeps .* in nvfp4, w4a16_nvfp4, fp8 alone"
    ):
        plan_quantizers(skeleton, resolve("int8_smoothquant"))


def test_linears_that_the_class_merges_are_named_as_on_the_hub(tmp_path: Path) -> None:
    write_family(minimax_m3(), tmp_path)
    skeleton = Skeleton(load_config(tmp_path), Source.open(tmp_path).tensors)
    gate, up = (f"language_model.model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up"))
    memory = "model.language_model.layers.0.mlp.gate_up_proj"
    plan = plan_quantizers(skeleton, resolve("fp8"))
    assert plan.merged[gate] == plan.merged[up] == memory
    assert plan.inputs[gate] == plan.inputs[up] == f"{memory}.input_quantizer"
    # Layer 0, and the shared experts of layer 1.
    assert len(plan.merged) == 4 and not plan.merged.keys() & plan.left_out.keys()
    attention = plan_quantizers(skeleton, resolve("general/ptq/nvfp4_omlp_only-kv_fp8"))
    assert attention.merged.keys() == plan.merged.keys()


def test_an_excluded_linear_of_the_class_stands_for_those_of_the_hub(tmp_path: Path) -> None:
    write_family(minimax_m3(), tmp_path)
    skeleton = Skeleton(load_config(tmp_path), Source.open(tmp_path).tensors)
    mlp = "model.language_model.layers.0.mlp"
    config = {
        "quantization": {
            "exclude_modules": [f"{mlp}.gate_up_proj"],
            "quantized_layers": {f"{mlp}.gate_up_proj": 1},
        }
    }
    hubs = [f"language_model.model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up")]
    assert in_hub_names(config, skeleton)["quantization"] == {
        "exclude_modules": hubs,
        "quantized_layers": dict.fromkeys(hubs, 1),
    }
