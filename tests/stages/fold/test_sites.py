from transformers import (
    DeepseekV3Config,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    NemotronHConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from stages.fold.folds import FoldMap
from stages.fold.sites import fold_map
from stages.model.text_model import TextModel
from state.layout import Relation

ATTENTION = {
    "self_attn.q_proj.weight": (8, 12),
    "self_attn.k_proj.weight": (4, 12),
    "self_attn.v_proj.weight": (4, 12),
    "self_attn.o_proj.weight": (12, 8),
    "input_layernorm.weight": (12,),
    "post_attention_layernorm.weight": (12,),
}
DENSE = ATTENTION | {
    "mlp.gate_proj.weight": (10, 12),
    "mlp.up_proj.weight": (10, 12),
    "mlp.down_proj.weight": (12, 10),
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12, "head_dim": 2}


def layer(tensors: dict[str, tuple[int, ...]], prefix: str = "model.layers.0.") -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in tensors.items()}


def norm(
    leaf: str, *members: str, prefix: str = "model.layers.L.", layers: tuple[int, ...] = (0,)
) -> Relation:
    names = tuple(prefix + member for member in members)
    return Relation(kind="norm_consumers", norm=prefix + leaf, members=names, layers=layers)


def consumers(folds: FoldMap, site: str) -> list[str]:
    return [operand.tensor for operand in folds.sites[site].consumers]


QKV = norm("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = norm("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj")


def test_a_dense_layer_has_four_sites() -> None:
    folds = fold_map(layer(DENSE), TextModel.of(LlamaConfig(**HEADS)), [QKV, GATE_UP])
    assert {site.name: (site.kind, site.channels) for site in folds.sites.values()} == {
        "model.layers.0.input_layernorm": ("norm", 12),
        "model.layers.0.post_attention_layernorm": ("norm", 12),
        "model.layers.0.self_attn.v_proj": ("v_to_o", 4),
        "model.layers.0.mlp.up_proj": ("up_to_down", 10),
    }
    values = folds.sites["model.layers.0.self_attn.v_proj"]
    assert values.entries().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert consumers(folds, "model.layers.0.input_layernorm") == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ]
    assert folds.impossible == {}


def test_layers_that_calibration_did_not_run_through_are_left_alone() -> None:
    tensors = layer(DENSE) | layer(DENSE, "model.layers.1.") | layer(DENSE, "vision.layers.0.")
    folds = fold_map(tensors, TextModel.of(LlamaConfig(**HEADS)), [QKV, GATE_UP])
    assert all(name.startswith("model.layers.0.") for name in folds.sites)


def test_one_plus_weight_is_a_fact_of_the_family() -> None:
    assert (
        fold_map(layer(DENSE), TextModel.of(GemmaConfig(**HEADS)), [QKV])
        .sites["model.layers.0.input_layernorm"]
        .plus_one
    )
    assert (
        not fold_map(layer(DENSE), TextModel.of(LlamaConfig(**HEADS)), [QKV])
        .sites["model.layers.0.input_layernorm"]
        .plus_one
    )


def test_the_final_norm_is_not_folded() -> None:
    final = Relation(kind="norm_consumers", norm="model.norm", members=("lm_head",))
    tensors = layer(DENSE) | {"model.norm.weight": (12,), "lm_head.weight": (16, 12)}
    folds = fold_map(tensors, TextModel.of(LlamaConfig(**HEADS)), [QKV, GATE_UP, final])
    assert list(folds.impossible) == ["lm_head"]
    assert "last hidden state" in folds.impossible["lm_head"]


def test_a_family_that_was_not_checked_is_not_folded_at_all() -> None:
    config = PretrainedConfig(num_attention_heads=4)
    config.model_type = "novel"
    folds = fold_map(layer(DENSE), TextModel.of(config), [QKV, GATE_UP])
    assert folds.sites == {}
    assert len(folds.impossible) == 7
    assert set(folds.impossible.values()) == {"folding was not checked for model type 'novel'"}


def test_a_norm_that_was_not_checked_is_not_folded() -> None:
    odd = norm("odd_norm", "mlp.gate_proj", "mlp.up_proj")
    folds = fold_map(
        layer(DENSE | {"odd_norm.weight": (12,)}), TextModel.of(LlamaConfig(**HEADS)), [QKV, odd]
    )
    reason = "folding into odd_norm was not checked for model type 'llama'"
    assert folds.impossible == {f"model.layers.0.mlp.{leaf}": reason for leaf in ("gate_proj", "up_proj")}


def test_routers_and_experts_without_tokens_are_consumers_too() -> None:
    experts = {
        f"mlp.experts.{number}.{leaf}.weight": (12, 3) if leaf == "down_proj" else (3, 12)
        for number in range(2)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    observed = norm("post_attention_layernorm", "mlp.experts.E.gate_proj", "mlp.experts.E.up_proj")
    tensors = layer(ATTENTION | experts | {"mlp.gate.weight": (2, 12)})
    folds = fold_map(tensors, TextModel.of(Qwen3MoeConfig(**HEADS)), [QKV, observed])
    assert consumers(folds, "model.layers.0.post_attention_layernorm") == [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.1.gate_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
    ]
    assert "model.layers.0.mlp.experts.1.up_proj" in folds.sites


def test_a_norm_is_not_divided_when_one_consumer_can_not_be_multiplied() -> None:
    packed = {"mlp.experts.gate_up_proj_blocks": (2, 12, 3, 16), "mlp.router.weight": (2, 12)}
    observed = norm("post_attention_layernorm", "mlp.experts.E.gate_proj", "mlp.experts.E.up_proj")
    folds = fold_map(layer(ATTENTION | packed), TextModel.of(GptOssConfig(**HEADS)), [QKV, observed])
    assert "model.layers.0.post_attention_layernorm" not in folds.sites
    assert folds.impossible["model.layers.0.mlp.router"] == (
        "model.layers.0.post_attention_layernorm also feeds model.layers.0.mlp.experts.0.gate_proj, "
        "of which the checkpoint has no unquantized weight"
    )


def test_a_norm_over_heads_does_not_fit_what_reads_all_heads() -> None:
    wide = DENSE | {"input_layernorm.weight": (3,)}
    folds = fold_map(layer(wide), TextModel.of(LlamaConfig(**HEADS)), [QKV])
    assert folds.impossible["model.layers.0.self_attn.q_proj"] == (
        "model.layers.0.input_layernorm has 3 channels, but model.layers.0.self_attn.q_proj reads 12"
    )


def test_mla_has_one_entry_per_channel_of_every_head() -> None:
    tensors = {
        "self_attn.kv_b_proj.weight": (20, 5),
        "self_attn.o_proj.weight": (12, 8),
        "input_layernorm.weight": (12,),
    }
    folds = fold_map(
        layer(tensors), TextModel.of(DeepseekV3Config(num_attention_heads=4)), [norm("input_layernorm")]
    )
    site = folds.sites["model.layers.0.self_attn.kv_b_proj"]
    assert (site.channels, site.sources[0].period, site.sources[0].first) == (8, 5, 3)


def test_without_a_gate_only_relu_squared_lets_a_scale_through() -> None:
    tensors = {"norm.weight": (12,), "mixer.up_proj.weight": (10, 12), "mixer.down_proj.weight": (12, 10)}
    relation = norm("norm", "mixer.up_proj")
    squared = fold_map(layer(tensors), TextModel.of(NemotronHConfig(mlp_hidden_act="relu2")), [relation])
    assert squared.sites["model.layers.0.mixer.up_proj"].degree == 2
    smooth = fold_map(layer(tensors), TextModel.of(NemotronHConfig(mlp_hidden_act="silu")), [relation])
    assert (
        smooth.impossible["model.layers.0.mixer.down_proj"]
        == "silu between up and down doesn't let a scale through"
    )
