"""From a model without weights to its relations and the layout of the store."""

from pathlib import Path

import pytest

from stages.calibrate.observe.arrays import plan_layout
from stages.calibrate.observe.relations import Probe, probe, relations
from stages.model.skeleton import Skeleton, load_config
from state.layout import Relation
from state.source import Source
from tests.stages.export import support

ATTENTION = tuple(f"model.layers.L.self_attn.{leaf}_proj" for leaf in "qkv")
DENSE = ("model.layers.L.mlp.gate_proj", "model.layers.L.mlp.up_proj")
EXPERT = ("model.layers.L.mlp.experts.E.gate_proj", "model.layers.L.mlp.experts.E.up_proj")
LAYERS = (0, 1)


def skeleton(family: str, folder: Path, **changes: object) -> Skeleton:
    support.make_model(folder, support.config_of(family, **changes))
    return Skeleton(load_config(folder), Source.open(folder).tensors)


def test_relations_of_a_dense_model(tmp_path: Path) -> None:
    model = skeleton("llama", tmp_path)
    assert relations(model, probe(model, model.model)) == (
        Relation(kind="same_input", members=ATTENTION, layers=LAYERS),
        Relation(kind="same_input", members=DENSE, layers=LAYERS),
        Relation(
            kind="norm_consumers", norm="model.layers.L.input_layernorm", members=ATTENTION, layers=LAYERS
        ),
        Relation(
            kind="norm_consumers",
            norm="model.layers.L.post_attention_layernorm",
            members=DENSE,
            layers=LAYERS,
        ),
        Relation(kind="norm_consumers", norm="model.norm", members=("lm_head",)),
        Relation(kind="engine_fused", members=ATTENTION, layers=LAYERS),
        Relation(kind="engine_fused", members=DENSE, layers=LAYERS),
    )


def test_relations_of_a_mixture_of_experts(tmp_path: Path) -> None:
    model = skeleton("qwen3_moe", tmp_path)
    found = relations(model, probe(model, model.model))
    norm = "model.layers.L.post_attention_layernorm"
    assert Relation(kind="same_input", members=EXPERT, layers=LAYERS) in found
    assert Relation(kind="engine_fused", members=EXPERT, layers=LAYERS) in found
    consumers = ("model.layers.L.mlp.gate", *EXPERT)
    assert Relation(kind="norm_consumers", norm=norm, members=consumers, layers=LAYERS) in found


def test_layers_of_two_kinds_are_told_apart(tmp_path: Path) -> None:
    model = skeleton("qwen3_moe", tmp_path, mlp_only_layers=[0])
    found = relations(model, probe(model, model.model))
    assert Relation(kind="same_input", members=DENSE, layers=(0,)) in found
    assert Relation(kind="same_input", members=EXPERT, layers=(1,)) in found


def test_the_probe_works_on_loaded_weights_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = skeleton("qwen3_moe", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relations(model, probe(model, loaded)) == relations(model, probe(model, model.model))


def test_layout(tmp_path: Path) -> None:
    model = skeleton("qwen3_moe", tmp_path)
    layout = plan_layout(model, probe(model, model.model))
    shapes = {array.key: array.shape(array.statistics[0]) for array in layout.arrays}
    assert shapes == {
        "model.layers.L.self_attn.q_proj.input": (2, 64),
        "model.layers.L.self_attn.o_proj.input": (2, 64),
        "model.layers.L.self_attn.k": (2, 32),
        "model.layers.L.self_attn.v": (2, 32),
        "model.layers.L.mlp.gate.input": (2, 64),
        "model.layers.L.mlp.experts.E.gate_proj.input": (2, 4, 64),
        "model.layers.L.mlp.experts.E.down_proj.input": (2, 4, 32),
        "lm_head.input": (64,),
        **{f"model.layers.L.self_attn.{leaf}_proj.weight": (2,) for leaf in "qkvo"},
        "model.layers.L.mlp.gate.weight": (2,),
        **{f"model.layers.L.mlp.experts.E.{leaf}_proj.weight": (2, 4) for leaf in ("gate", "up", "down")},
        "lm_head.weight": (),
    }
    assert layout.aliases == {
        "model.layers.L.self_attn.k_proj.input": "model.layers.L.self_attn.q_proj.input",
        "model.layers.L.self_attn.v_proj.input": "model.layers.L.self_attn.q_proj.input",
        "model.layers.L.mlp.experts.E.up_proj.input": "model.layers.L.mlp.experts.E.gate_proj.input",
    }
    assert layout.quantizers["model.layers.L.mlp.experts.gate_up_proj_input_quantizer"] == (
        "model.layers.L.mlp.experts.E.gate_proj.input",
        "model.layers.L.mlp.experts.E.up_proj.input",
    )


def test_no_alias_where_the_shared_input_does_not_hold_everywhere(tmp_path: Path) -> None:
    """K reads Q's input in layer 0 only: an alias stands for all layers, so both are stored."""
    model = skeleton("llama", tmp_path)
    inputs = []
    for layer in LAYERS:
        for number, leaf in enumerate(("q_proj", "k_proj", "v_proj")):
            tensor = 10 * layer + (number if layer else 0)
            inputs.append((f"model.layers.{layer}.self_attn.{leaf}", tensor, tensor))
    layout = plan_layout(model, Probe(inputs=inputs))
    assert not [alias for alias in layout.aliases if "self_attn" in alias]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_forward_is_not_changed_by_a_probe(family: str, tmp_path: Path) -> None:
    model = skeleton(family, tmp_path)
    before = model.model.config._attn_implementation
    probe(model, model.model)
    assert model.model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
