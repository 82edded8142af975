"""Which weights are found quantized, by literal headers; every refusal names its tensor."""

from typing import Any

import pytest
import torch

from stages.model.dequantize.detect import Found, find_quantized
from stages.model.dequantize.stated import Grain, Stated, stated_quantization, without_quantization
from state.errors import InputError
from state.source import TensorEntry

SQUARES = Stated("fp8", fp8=frozenset({Grain(128, 128)}))
Header = dict[str, tuple[str, tuple[int, ...]]]


def found(header: Header, stated: Stated | None = None, shapes: dict[str, list[int]] | None = None) -> Found:
    tensors = {
        name: TensorEntry(name, dtype, shape, "model.safetensors", 0, 0)
        for name, (dtype, shape) in header.items()
    }
    return find_quantized(tensors, shapes or {}, stated, torch.bfloat16, "models/x")


def schemes(header: Header, stated: Stated | None = None, **shapes: list[int]) -> dict[str, str]:
    named = {name.replace("__", "."): values for name, values in shapes.items()}
    return {name: weight.described for name, weight in found(header, stated, named).weights.items()}


@pytest.mark.parametrize("stated", [None, SQUARES], ids=["by tensors alone", "as stated"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
def test_fp8_blocks(dtype: str, stated: Stated | None) -> None:
    header: Header = {"a.weight": ("F8_E4M3", (130, 300)), "a.weight_scale_inv": (dtype, (2, 3))}
    assert schemes(header, stated) == {"a.weight": "FP8 in blocks of 128 x 128"}


@pytest.mark.parametrize(
    ("scale", "scheme"),
    [
        ((), "FP8 per tensor"),
        ((1,), "FP8 per tensor"),
        ((130,), "FP8 per channel"),
        ((130, 1), "FP8 per channel"),
        ((2, 3), "FP8 in blocks of 128 x 128"),
        ((2, 1, 3, 1), "FP8 in blocks of 128 x 128"),
    ],
)
def test_fp8_by_the_shape_of_the_scale(scale: tuple[int, ...], scheme: str) -> None:
    header: Header = {"a.weight": ("F8_E4M3", (130, 300)), "a.weight_scale": ("F32", scale)}
    assert schemes(header) == {"a.weight": scheme}


def test_fused_experts_in_fp8() -> None:
    header: Header = {"e.gate_up": ("F8_E4M3", (4, 256, 128)), "e.gate_up_scale_inv": ("F32", (4, 2, 1))}
    entry = found(header).weights["e.gate_up"].entry("e.gate_up", TensorEntry("e", "", (), "f", 7, 0))
    assert entry == TensorEntry("e.gate_up", "BF16", (4, 256, 128), "f", 7, 2 * 4 * 256 * 128)


def test_mxfp4_experts_are_presented_as_models_have_them() -> None:
    header: Header = {"e.up_blocks": ("U8", (4, 6, 3, 16)), "e.up_scales": ("U8", (4, 6, 3))}
    (weight,) = found(header, Stated("mxfp4")).weights.values()
    assert weight.described == "FP4 in groups of 32" and weight.tensors == ("e.up_blocks", "e.up_scales")
    assert weight.entry("e.up", TensorEntry("e", "", (), "f", 0, 0)).shape == (4, 96, 6)


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_fp4_in_a_matrix_of_its_own(dtype: str) -> None:
    """DeepSeek-V4: experts in FP4 beside FP8 blocks, of which alone its config.json speaks."""
    header: Header = {
        "w1.weight": ("I8", (6, 48)),
        "w1.scale": (dtype, (6, 3)),
        "wq.weight": ("F8_E4M3", (256, 128)),
        "wq.scale": ("F8_E8M0", (2, 1)),
    }
    assert schemes(header, SQUARES) == {
        "w1.weight": "FP4 in groups of 32",
        "wq.weight": "FP8 in blocks of 128 x 128",
    }


def test_int4_groups() -> None:
    header: Header = {
        "a.weight_packed": ("I32", (6, 12)),
        "a.weight_scale": ("BF16", (6, 3)),
        "a.weight_shape": ("I64", (2,)),
    }
    stated = Stated("compressed-tensors", int4=frozenset({Grain(1, 32)}))
    (weight,) = found(header, stated, {"a.weight_shape": [6, 90]}).weights.values()
    assert (weight.rows, weight.columns, weight.described) == (6, 90, "INT4 in groups of 32")
    assert schemes(header, None, a__weight_shape=[6, 96]) == {"a.weight": "INT4 in groups of 32"}
    with pytest.raises(
        InputError, match=r"a\.weight_packed is I32\[6, 12\], and it does not hold the \[6, 80\]"
    ):
        schemes(header, stated, a__weight_shape=[6, 80])


def test_scales_of_inputs_and_caches_are_spent() -> None:
    header: Header = {
        "q.weight": ("F8_E4M3", (8, 8)),
        "q.weight_scale": ("F32", ()),
        "q.input_scale": ("F32", ()),
        "attn.k_scale": ("F32", ()),
        "router.per_expert_scale": ("BF16", (4,)),
    }
    assert found(header).spent == ("q.input_scale", "attn.k_scale")


def test_plain_checkpoints_hold_nothing_quantized() -> None:
    header: Header = {
        "a.weight": ("BF16", (8, 8)),
        "hc_attn_scale": ("F32", (3,)),
        "input_scale": ("F32", ()),
        "position_ids": ("I64", (8,)),
    }
    assert found(header) == Found()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a.weight": ("F8_E4M3", (8, 8))}, r"a\.weight is F8_E4M3\[8, 8\], and it has no scale beside it"),
        (
            {"a.weight": ("F8_E5M2", (8, 8)), "a.weight_scale": ("F32", ())},
            r"a\.weight is F8_E5M2\[8, 8\], and it is of a scheme",
        ),
        (
            {"a.weight": ("F8_E4M3", (8, 8)), "a.weight_scale": ("F32", (3, 3))},
            r"scale of another shape \(a\.weight_scale is F32\[3, 3\]\)",
        ),
        (
            {"a.weight": ("F8_E4M3", (4, 8, 8)), "a.weight_scale": ("F32", ())},
            r"a\.weight is F8_E4M3\[4, 8, 8\], and it has a scale of another shape",
        ),
        (
            {"a.weight": ("U8", (8, 8)), "a.weight_scale": ("F8_E4M3", (8, 1)),
             "a.weight_scale_2": ("F32", ())},
            r"a scale that can't be read \(a\.weight_scale is F8_E4M3\[8, 1\]\)",
        ),
        (
            {"a.weight": ("I8", (8, 16)), "a.weight_scale": ("F32", (8, 1))},
            r"a\.weight is I8\[8, 16\], and it has a scale that can't be read",
        ),
        ({"a.qweight": ("I32", (8, 8)), "a.scales": ("F16", (1, 8))}, r"a\.qweight is I32"),
        ({"a.weight": ("U8", (64, 1)), "a.weight.absmax": ("F32", (4,))}, r"a\.weight is U8\[64, 1\]"),
        ({"e.up_blocks": ("U8", (4, 6, 3, 16))}, r"e\.up_blocks is U8\[4, 6, 3, 16\]"),
        (
            {"e.up_blocks": ("U8", (6, 3, 16)), "e.up_scales": ("U8", (6, 3)), "e.up": ("BF16", (6, 96))},
            r"e\.up_blocks .* stands for e\.up, which is stored besides",
        ),
        (
            {"a.weight": ("F8_E4M3", (8, 8)), "a.weight_scale": ("F32", ()),
             "a.pre_quant_scale": ("F32", (8,))},
            r"a\.pre_quant_scale is F32",
        ),
        (
            {"a.weight_packed": ("I32", (8, 8)), "a.weight_scale": ("F32", (8, 2)),
             "a.weight_zero_point": ("I32", (1, 2))},
            r"a\.weight_zero_point is I32",
        ),
        ({"a.weight_scale": ("BF16", (4,))}, r"a\.weight_scale is BF16\[4\], and it is of a scheme"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(header: Header, words: str) -> None:
    with pytest.raises(InputError, match=words):
        found(header)


def test_what_contradicts_config_json_is_named() -> None:
    header: Header = {"a.weight": ("F8_E4M3", (256, 256)), "a.weight_scale_inv": ("F32", (4, 4))}
    with pytest.raises(InputError, match=r"F32\[4, 4\]\), and config.json says one for 128 x 128"):
        found(header, SQUARES)
    assert schemes(header, Stated("fp8", frozenset({Grain(64, 64)}))) == {
        "a.weight": "FP8 in blocks of 64 x 64"
    }
    left = Stated("fp8", unconverted=("lm_head", "a"))
    with pytest.raises(InputError, match=r"a\.weight is F8_E4M3.* not quantized"):
        found({"a.weight": ("F8_E4M3", (8, 8)), "a.weight_scale": ("F32", ())}, left)
    with pytest.raises(InputError, match=r"quant_method is 'fp8'\), and no tensor is"):
        found({"a.weight": ("BF16", (8, 8))}, SQUARES)


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return {"text_config": {"quantization_config": stated}}


def test_what_configurations_say() -> None:
    assert stated_quantization({"model_type": "llama"}, "c") is None
    squares = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert stated_quantization(squares, "c") == SQUARES
    found = stated_quantization(compressed(), "c")
    assert found == Stated("compressed-tensors", int4=frozenset({Grain(1, 32)}))
    rows = compressed(num_bits=8, type="float", strategy="channel")
    assert stated_quantization(rows, "c") == Stated("compressed-tensors", frozenset({Grain(1, None)}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "c says .* quant_method 'gptq' can't be read"),
        (compressed(num_bits=8), "config_groups.group_0.weights: int8"),
        (compressed(symmetric=False), "not symmetric"),
        (compressed(strategy="tensor_group"), "strategy 'tensor_group'"),
    ],
)
def test_what_configurations_say_that_cannot_be_read(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        stated_quantization(config, "c")


def test_a_configuration_without_quantization() -> None:
    config = {"a": 1, "quantization_config": {"x": 1}, "text_config": {"quantization_config": {}, "b": [1]}}
    assert without_quantization(config) == {"a": 1, "text_config": {"b": [1]}}
