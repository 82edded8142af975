"""Each engine's rule for the list of unquantized modules, on names alone."""

import pytest

from stages.engines.exclusion import caught, excluded, expected_quantized

Q = "model.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize(
    ("engine", "module", "entry", "expected"),
    [
        ("vllm", "lm_head", "lm_head", True),
        ("vllm", "model.layers.10.self_attn.o_proj", "model.layers.1", True),  # plain text: layer 10 too
        ("sglang", "model.layers.10.self_attn.o_proj", "model.layers.1", False),
        ("trtllm", "model.layers.10.self_attn.o_proj", "model.layers.1", False),
        ("vllm", "model.layers.10.self_attn.o_proj", "model.layers.1.*", False),
        ("vllm", Q.format(1), "model.layers.1.self_attn*", True),
        ("sglang", Q.format(1), "model.layers.1.self_attn*", True),
        ("trtllm", Q.format(1), "model.layers.1.self_attn*", True),
        ("vllm", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate", True),
        ("trtllm", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate", False),
        ("vllm", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate", True),  # asked for as gate_up_proj
        ("vllm", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.0.up_proj", True),
        ("vllm", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts", True),
        ("vllm", "model.layers.1.mlp.experts.3.up_proj", "model.layers.11.mlp.experts", False),
        ("vllm", "model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.experts", False),
        ("sglang", "mtp.fc", "mtp*", True),
        ("sglang", "model.mtp.fc", "mtp*", True),  # any part between dots
        ("trtllm", "model.mtp.fc", "mtp*", False),
        ("sglang", "language_model.lm_head", "lm_head", True),
    ],
)  # fmt: skip
def test_one_entry(engine: str, module: str, entry: str, expected: bool) -> None:
    found = excluded(engine, module, [entry])  # type: ignore[arg-type]
    assert found == (entry if expected else None)


def test_experts_of_a_layer_are_asked_for_at_once() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{n}.up_proj" for layer in (1, 2) for n in range(3)]
    listed = ["model.layers.2.mlp.experts.1.up_proj"]
    assert caught("vllm", experts, listed) == {"model.layers.2.mlp.experts.0.up_proj": listed[0]}
    assert expected_quantized("vllm", experts, listed) == ["model.layers.1.mlp.experts.0.up_proj"]


def test_vllm_builds_vision_towers_unquantized() -> None:
    modules = ["vision_tower.blocks.0.qkv", "visual.blocks.0.qkv"]
    assert expected_quantized("vllm", modules, []) == ["visual.blocks.0.qkv"]
    assert expected_quantized("trtllm", modules, []) == sorted(modules)
