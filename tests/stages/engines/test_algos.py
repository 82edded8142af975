"""The table of formats as engines see them."""

import pytest

from stages.engines import ENGINES
from stages.engines.algos import ALGOS, algo_in_groups, refusal
from stages.engines.judge import fused_groups, loads, misfit
from stages.engines.stated import LayerAlgo, Stated
from stages.formats import TABLE

OURS = {
    "nvfp4": "NVFP4",
    "fp8": "FP8",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "w4a16_nvfp4": "W4A16_NVFP4",
    "mxfp8": "MXFP8",
    "fp8_pb_wo": "FP8_PB_WO",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
}
ROWS, COLUMNS = 256, 384
PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"


@pytest.mark.parametrize("name", OURS)
def test_what_export_stores_is_what_engines_ask_for(name: str) -> None:
    algo = ALGOS[OURS[name]]
    stored = {leaf: (dtype, shape) for leaf, dtype, shape in TABLE[name].stored(ROWS, COLUMNS)}
    asked = {leaf.name: leaf for leaf in algo.leaves if leaf.name not in ("input_scale", "pre_quant_scale")}
    assert asked.keys() == stored.keys()
    for leaf, (dtype, shape) in stored.items():
        assert asked[leaf].dtype == dtype and shape in asked[leaf].shapes(ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("algo", "leaf", "shapes"),
    [
        ("NVFP4", "weight", ((256, 192),)),
        ("NVFP4", "weight_scale", ((256, 24),)),
        ("NVFP4", "weight_scale_2", ((), (1,))),
        ("FP8", "weight_scale", ((), (1,))),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", ((256,),)),
        ("FP8_PB_WO", "weight_scale", ((2, 1, 3, 1),)),
        ("MXFP8", "weight_scale", ((256, 12),)),
        ("W4A16_AWQ", "weight", ((128, 384),)),
        ("W4A16_AWQ", "weight_scale", ((256, 3),)),
        ("NVFP4_AWQ", "pre_quant_scale", ((384,),)),
    ],
)
def test_shapes(algo: str, leaf: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    found = ALGOS[algo].leaf(leaf)
    assert found is not None and found.shapes(ROWS, COLUMNS) == shapes


def test_partial_blocks_of_rows_are_counted() -> None:
    assert ALGOS["FP8_PB_WO"].leaves[1].shapes(200, 256) == ((2, 1, 2, 1),)
    assert misfit(ALGOS["FP8_PB_WO"], 200, 256) is None
    assert misfit(ALGOS["FP8_PB_WO"], 200, 192) == "is [200, 192], and FP8_PB_WO needs multiples of [1, 128]"


@pytest.mark.parametrize("algo", ALGOS.values(), ids=ALGOS.keys())
def test_sizes_are_the_inverse_of_shapes(algo: object) -> None:
    assert algo.sizes(algo.codes.shapes(ROWS, COLUMNS)[0]) == (ROWS, COLUMNS)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("engine", "algo", "kind", "mixed", "expected"),
    [
        ("vllm", "NVFP4", "experts", False, None),
        ("vllm", PER_TOKEN, "linear", False, None),
        ("vllm", PER_TOKEN, "experts", False, f"does not load {PER_TOKEN} of experts"),
        ("sglang", PER_TOKEN, "linear", False, f"does not load {PER_TOKEN}"),
        ("vllm", "NVFP4_AWQ", "linear", False, "does not load NVFP4_AWQ"),
        ("sglang", "NVFP4_AWQ", "linear", False, None),
        ("sglang", "NVFP4_AWQ", "experts", False, "does not load NVFP4_AWQ of experts"),
        ("sglang", "FP8_PB_WO", "linear", False, "does not load FP8_PB_WO"),
        ("sglang", "FP8_PB_WO", "linear", True, None),
        ("vllm", "W4A16_AWQ", "linear", True, "does not load W4A16_AWQ inside MIXED_PRECISION"),
        ("trtllm", "W4A16_NVFP4", "linear", False, "does not load W4A16_NVFP4"),
        ("vllm", "NVFP9", "linear", False, "knows no quant_algo NVFP9"),
    ],
)  # fmt: skip
def test_who_loads_what(engine: str, algo: str, kind: str, mixed: bool, expected: str | None) -> None:
    assert refusal(engine, algo, kind, mixed) == expected  # type: ignore[arg-type]


def test_reasons_say_what_to_do_instead() -> None:
    stated = Stated("W4A16_AWQ", 128, (), "NVFP4")
    found = loads(stated, {"a.q_proj": "W4A16_AWQ"})
    assert set(found) == set(ENGINES)
    assert found["sglang"] == ["does not load W4A16_AWQ; choose a recipe such as nvfp4 or fp8"]
    assert found["vllm"][1].startswith("ignores an NVFP4 KV cache")


def test_experts_in_one_tensor_are_not_known_to_load() -> None:
    (reason,) = loads(Stated("FP8", None, (), None), {}, ["m.experts.down_proj"])["vllm"]
    assert reason.startswith("is not known to load experts of a layer in one quantized tensor (m.experts")


def test_groups_of_another_size_have_other_scales_and_no_engine() -> None:
    algo = algo_in_groups("W4A16_NVFP4", 32)
    assert algo is not None and algo is algo_in_groups("W4A16_NVFP4", 32)
    assert algo.leaves[1].shapes(64, 128) == ((64, 4),)
    assert algo_in_groups("W4A16_NVFP4", 16) is ALGOS["W4A16_NVFP4"]
    assert algo_in_groups("NVFP4", 0) is None and algo_in_groups("NVFP4", 10**30) is None
    assert algo_in_groups("FP8", 32) is ALGOS["FP8"] and algo_in_groups("NVFP9") is None
    stated = Stated("W4A16_NVFP4", 32, (), None)
    (reason,) = loads(stated, {"a.q_proj": "W4A16_NVFP4"})["vllm"]
    assert reason.startswith("loads W4A16_NVFP4 in groups of 16 alone, not of 32")


def test_groups_are_of_members_that_are_there() -> None:
    modules = ["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.up_proj", "c.w1", "c.w3", "d.q_proj"]
    assert fused_groups(modules) == [("a.q_proj", "a.k_proj", "a.v_proj"), ("c.w1", "c.w3")]


def test_a_mixed_checkpoint_says_the_format_of_each_layer() -> None:
    stated = Stated(
        "MIXED_PRECISION", None, (), None, {"a.mlp.experts": LayerAlgo("NVFP4", 16), "a.q": LayerAlgo("FP8")}
    )
    assert (
        stated.algo_of("a.mlp.experts.3.up_proj") == "NVFP4"
        and stated.group_of("a.mlp.experts.3.up_proj") == 16
    )
    assert stated.algo_of("a.q") == "FP8" and stated.algo_of("a.k") is None
