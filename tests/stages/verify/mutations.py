"""Ways to damage a good checkpoint, and the rule that finds each."""

from dataclasses import dataclass

import torch

from tests.stages.verify.edits import (
    Edit,
    add,
    drop,
    enlist,
    fewer_rows,
    group_size,
    nan_code,
    no_config,
    no_kv,
    no_kv_scales,
    one_bit,
    one_scale,
    other_halves,
    other_nibbles,
    plain_again,
    put,
    put_value,
    said,
    swap,
    swizzled,
    times,
    unlist,
    weight_alone,
    with_nan,
)

ATTENTION = "model.layers.1.self_attn"
Q_PROJ, O_PROJ = f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj"
EXPERTS = "model.layers.0.mlp.experts"
UP, GATE, DOWN = (f"{EXPERTS}.2.{leaf}_proj" for leaf in ("up", "gate", "down"))
NORM = "model.layers.1.input_layernorm.weight"


@dataclass(frozen=True)
class Mutation:
    """edit: what is done. rule, name: what has to be found, and of what. good: which checkpoint it is done
    to.
    """

    edit: Edit
    rule: str
    name: str
    good: str = "nvfp4"


FOUND_BY_STRUCTURE: dict[str, Mutation] = {
    # A scale of one value
    "an input scale is missing": Mutation(
        drop(f"{O_PROJ}.input_scale"), "missing-tensor", f"{O_PROJ}.input_scale"
    ),
    "a second scale is missing": Mutation(
        drop(f"{UP}.weight_scale_2"), "missing-tensor", f"{UP}.weight_scale_2"
    ),
    "an input scale is zero": Mutation(
        put_value(f"{O_PROJ}.input_scale", 0.0), "scale-value", f"{O_PROJ}.input_scale"
    ),
    "a second scale is negative": Mutation(
        times(f"{O_PROJ}.weight_scale_2", factor=-1.0), "scale-value", f"{O_PROJ}.weight_scale_2"
    ),
    "a second scale is NaN": Mutation(
        put_value(f"{O_PROJ}.weight_scale_2", float("nan")), "scale-value", f"{O_PROJ}.weight_scale_2"
    ),
    "an input scale is infinite": Mutation(
        put_value(f"{DOWN}.input_scale", float("inf")), "scale-value", f"{DOWN}.input_scale"
    ),
    "an input scale is a vector": Mutation(
        put(f"{O_PROJ}.input_scale", lambda old: old.repeat(64)), "shape", f"{O_PROJ}.input_scale"
    ),
    "an input scale is in bf16": Mutation(
        put(f"{O_PROJ}.input_scale", lambda old: old.bfloat16()), "dtype", f"{O_PROJ}.input_scale"
    ),
    "a second scale is in f64": Mutation(
        put(f"{O_PROJ}.weight_scale_2", lambda old: old.double()), "dtype", f"{O_PROJ}.weight_scale_2"
    ),
    "FP8's weight scale is a vector": Mutation(
        put(f"{O_PROJ}.weight_scale", lambda old: old.repeat(64)), "shape", f"{O_PROJ}.weight_scale", "fp8"
    ),
    "FP8's weight scale is missing": Mutation(
        drop(f"{O_PROJ}.weight_scale"), "missing-tensor", f"{O_PROJ}.weight_scale", "fp8"
    ),
    "FP8's input scale is missing": Mutation(
        drop(f"{DOWN}.input_scale"), "missing-tensor", f"{DOWN}.input_scale", "fp8"
    ),
    "INT8's scale of a row is zero": Mutation(
        put(f"{O_PROJ}.weight_scale", lambda old: old.index_fill(0, torch.tensor([1]), 0.0)),
        "scale-value",
        f"{O_PROJ}.weight_scale",
        "int8",
    ),
    # Scales of blocks
    "block scales are missing": Mutation(
        drop(f"{O_PROJ}.weight_scale"), "missing-tensor", f"{O_PROJ}.weight_scale"
    ),
    "block scales are in bf16": Mutation(
        put(f"{O_PROJ}.weight_scale", lambda old: old.bfloat16()), "dtype", f"{O_PROJ}.weight_scale"
    ),
    "block scales are of blocks of 32": Mutation(
        put(f"{O_PROJ}.weight_scale", lambda old: old[:, ::2]), "shape", f"{O_PROJ}.weight_scale"
    ),
    "block scales are of blocks of 8": Mutation(
        put(f"{UP}.weight_scale", lambda old: old.view(torch.uint8).repeat_interleave(2, 1).view(old.dtype)),
        "shape",
        f"{UP}.weight_scale",
    ),
    "block scales are transposed": Mutation(
        put(f"{O_PROJ}.weight_scale", lambda old: old.T), "shape", f"{O_PROJ}.weight_scale"
    ),
    "block scales are swizzled": Mutation(
        put(f"{O_PROJ}.weight_scale", swizzled), "shape", f"{O_PROJ}.weight_scale"
    ),
    "a block scale is NaN": Mutation(
        one_scale(f"{O_PROJ}.weight_scale", 0x7F), "block-scale", f"{O_PROJ}.weight_scale"
    ),
    "a block scale is negative": Mutation(
        one_scale(f"{O_PROJ}.weight_scale", 0x81), "block-scale", f"{O_PROJ}.weight_scale"
    ),
    "a block scale is zero over codes that are not": Mutation(
        one_scale(f"{UP}.weight_scale", 0), "block-scale", f"{UP}.weight_scale"
    ),
    # Weights
    "codes are in another dtype": Mutation(
        put(f"{O_PROJ}.weight", lambda old: old.view(torch.int8)), "dtype", f"{O_PROJ}.weight"
    ),
    "a code is NaN": Mutation(put(f"{O_PROJ}.weight", nan_code), "code-nan", f"{O_PROJ}.weight", "fp8"),
    "a norm has a NaN": Mutation(put("model.norm.weight", with_nan), "not-finite", "model.norm.weight"),
    "half of an expert is gone": Mutation(drop(f"{UP}."), "missing-tensor", f"{UP}.weight"),
    "an expert's codes are gone": Mutation(weight_alone(UP), "missing-tensor", f"{UP}.weight"),
    "an expert between others is gone": Mutation(drop(f"{EXPERTS}.2."), "missing-tensor", f"{DOWN}.weight"),
    "a weight is plain beside its scales": Mutation(
        plain_again(O_PROJ, (64, 64), ("weight_scale", "input_scale")),
        "extra-tensor",
        f"{O_PROJ}.weight_scale",
    ),
    "experts are there a second time, in one tensor": Mutation(
        add(f"{EXPERTS}.gate_up_proj", torch.ones(4, 64, 64, dtype=torch.bfloat16)),
        "packed-and-plain",
        f"{EXPERTS}.gate_up_proj",
    ),
    "q, k and v are there a second time, in one matrix": Mutation(
        add(f"{ATTENTION}.qkv_proj.weight", torch.ones(128, 64, dtype=torch.bfloat16)),
        "packed-and-plain",
        f"{ATTENTION}.qkv_proj.weight",
    ),
    "a weight is there in two layouts": Mutation(
        add(f"{O_PROJ}.weight_packed", torch.ones(64, 32, dtype=torch.uint8)),
        "packed-and-plain",
        f"{O_PROJ}.weight",
    ),
    "an AWQ scale was left behind": Mutation(
        add(f"{O_PROJ}.pre_quant_scale", torch.ones(64, dtype=torch.bfloat16)),
        "extra-tensor",
        f"{O_PROJ}.pre_quant_scale",
    ),
    "an inverse scale of another layout": Mutation(
        add(f"{O_PROJ}.weight_scale_inv", torch.ones(1, 1)), "extra-tensor", f"{O_PROJ}.weight_scale_inv"
    ),
    "FP8 with a second scale": Mutation(
        add(f"{O_PROJ}.weight_scale_2", torch.tensor(1.0)), "extra-tensor", f"{O_PROJ}.weight_scale_2", "fp8"
    ),
    # What the model's class has
    "the last expert is gone": Mutation(
        drop(f"{EXPERTS}.3."), "missing-tensor", f"{EXPERTS}.3.gate_proj.weight"
    ),
    "a norm is gone": Mutation(drop(NORM), "missing-tensor", NORM),
    "a router is gone": Mutation(
        drop("model.layers.0.mlp.gate."), "missing-tensor", "model.layers.0.mlp.gate.weight"
    ),
    "lm_head is gone, and is not tied": Mutation(drop("lm_head."), "missing-tensor", "lm_head.weight"),
    "embeddings are gone, to which lm_head is tied": Mutation(
        drop("model.embed_tokens."), "missing-tensor", "model.embed_tokens.weight", "layers"
    ),
    "a whole linear is gone": Mutation(drop(f"{O_PROJ}."), "missing-tensor", f"{O_PROJ}.weight"),
    "a whole layer is gone": Mutation(
        drop("model.layers.5."), "missing-tensor", "model.layers.5.mlp.down_proj.weight", "layers"
    ),
    "a weight has lost rows": Mutation(fewer_rows(O_PROJ, 48), "shape", f"{O_PROJ}.weight"),
    "an expert's weight has lost rows": Mutation(fewer_rows(UP, 16), "shape", f"{UP}.weight"),
    "an expert's up and down have changed places": Mutation(swap(UP, DOWN), "shape", f"{UP}.weight"),
    # Groups that are run as one
    "q has another second scale": Mutation(
        times(f"{Q_PROJ}.weight_scale_2", factor=1.5), "fused-scales", Q_PROJ
    ),
    "up has another second scale than gate": Mutation(
        times(f"{UP}.weight_scale_2", factor=0.5), "fused-scales", GATE
    ),
    "k has another input scale": Mutation(
        times(f"{ATTENTION}.k_proj.input_scale", factor=2.0), "fused-scales", Q_PROJ
    ),
    "q alone is unquantized": Mutation(plain_again(Q_PROJ, (64, 64), listed=True), "fused-formats", Q_PROJ),
    "an expert alone is unquantized": Mutation(
        plain_again(UP, (32, 64), listed=True), "fused-formats", EXPERTS
    ),
    # Configuration
    "the group size is another one": Mutation(group_size(32), "group-size", f"{O_PROJ}.weight_scale"),
    "the configurations disagree about the group size": Mutation(
        said(separate={"group_size": 32}), "config-disagree", "config.json"
    ),
    "the configurations disagree about the format": Mutation(
        said(separate={"quant_algo": "FP8"}), "config-disagree", "config.json"
    ),
    "the configurations disagree about the KV cache": Mutation(
        said(separate={"kv_cache_quant_algo": None}), "config-disagree", "config.json"
    ),
    "the configurations disagree about the list": Mutation(
        said(separate={"exclude_modules": ["lm_head"]}), "config-disagree", "config.json"
    ),
    "bits of another format in config_groups": Mutation(
        said(
            {
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float", "group_size": 16},
                        "targets": ["Linear"],
                    }
                }
            }
        ),
        "config-groups",
        "config.json",
    ),
    "a quant_algo that nobody knows": Mutation(
        said({"quant_algo": "NVFP9"}, {"quant_algo": "NVFP9"}), "not-declared", "NVFP9"
    ),
    "the format of other tensors": Mutation(
        said({"quant_algo": "FP8"}, {"quant_algo": "FP8"}), "dtype", f"{O_PROJ}.weight"
    ),
    "nothing is said of quantization": Mutation(no_config, "config", "config.json"),
    "the list lacks lm_head": Mutation(unlist("lm_head"), "not-excluded", "lm_head"),
    "the list lacks an MTP layer": Mutation(unlist("mtp.fc"), "not-excluded", "mtp.fc"),
    "the list lacks a router": Mutation(
        unlist("model.layers.1.mlp.gate"), "not-excluded", "model.layers.1.mlp.gate"
    ),
    "the list names a quantized linear": Mutation(enlist(O_PROJ), "excluded-quantized", O_PROJ),
    "the list names experts by a pattern": Mutation(
        enlist("*.mlp.experts*"), "excluded-quantized", f"{EXPERTS}.0.down_proj"
    ),
    "the list catches layer 10 with layer 1": Mutation(
        enlist("model.layers.1"), "excluded-quantized", "model.layers.10.self_attn.o_proj", "layers"
    ),
    # KV caches
    "scales of KV caches are not declared": Mutation(no_kv, "kv-undeclared", f"{ATTENTION}.k_proj.k_scale"),
    "KV caches are declared and their scales gone": Mutation(
        no_kv_scales, "kv-missing", f"{ATTENTION}.k_proj.k_scale"
    ),
    "KV caches are declared and never were": Mutation(
        said({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, {"kv_cache_quant_algo": "FP8"}),
        "kv-missing",
        f"{ATTENTION}.k_proj.k_scale",
        "fp8",
    ),
    "the scale of V is gone in one layer": Mutation(
        drop(f"{ATTENTION}.v_proj.v_scale"), "kv-missing", f"{ATTENTION}.v_proj.v_scale"
    ),
    "the scale of K is zero": Mutation(
        put_value(f"{ATTENTION}.k_proj.k_scale", 0.0), "scale-value", f"{ATTENTION}.k_proj.k_scale"
    ),
    "the scale of K is a vector": Mutation(
        put(f"{ATTENTION}.k_proj.k_scale", lambda old: old.repeat(2)), "shape", f"{ATTENTION}.k_proj.k_scale"
    ),
}
"""What is done → what finds it without the source."""

FOUND_BESIDE_THE_SOURCE: dict[str, Mutation] = {
    "gate and up have changed places": Mutation(swap(GATE, UP), "source-weights", GATE),
    "two experts have changed places": Mutation(
        swap(f"{EXPERTS}.0", f"{EXPERTS}.1"), "source-weights", f"{EXPERTS}.1.down_proj"
    ),
    "two layers have changed places": Mutation(
        swap("model.layers.0", "model.layers.1"), "source-weights", O_PROJ
    ),
    "k and v have changed places": Mutation(
        swap(f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj"),
        "source-weights",
        f"{ATTENTION}.k_proj",
        "fp8",
    ),
    "nibbles are in the other order": Mutation(
        put(f"{O_PROJ}.weight", other_nibbles), "source-weights", O_PROJ
    ),
    "nibbles are in halves of a row": Mutation(put(f"{UP}.weight", other_halves), "source-weights", UP),
    "a second scale is six times as large": Mutation(
        times(f"{O_PROJ}.weight_scale_2", factor=6.0), "source-weights", O_PROJ
    ),
    "a second scale is its reciprocal": Mutation(
        put(f"{DOWN}.weight_scale_2", lambda old: 1 / old), "source-weights", DOWN
    ),
    "FP8's scale is of another tensor": Mutation(
        times(f"{O_PROJ}.weight_scale", factor=3.0), "source-weights", O_PROJ, "fp8"
    ),
    "INT8's rows are in another order": Mutation(
        put(f"{O_PROJ}.weight", lambda old: old.flip(0)), "source-weights", O_PROJ, "int8"
    ),
    "a tensor of an MTP layer is gone": Mutation(drop("mtp.fc."), "source-dropped", "mtp.fc.weight"),
    "a tensor of an MTP layer has another bit": Mutation(
        put("mtp.fc.weight", one_bit), "source-changed", "mtp.fc.weight"
    ),
    "a router has another bit": Mutation(
        put("model.layers.1.mlp.gate.weight", one_bit), "source-changed", "model.layers.1.mlp.gate.weight"
    ),
    "two norms have changed places": Mutation(
        swap("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"),
        "source-changed",
        NORM,
    ),
    "lm_head is there, and the source ties it": Mutation(
        add("lm_head.weight", torch.ones(128, 64, dtype=torch.bfloat16)),
        "source-added",
        "lm_head.weight",
        "layers",
    ),
    "a bias that the source does not have": Mutation(
        add(f"{O_PROJ}.bias", torch.zeros(64, dtype=torch.bfloat16)), "source-added", f"{O_PROJ}.bias"
    ),
}
"""What is done → what finds it beside the source alone (`--model`)."""

LEFT_TO_NUMBERS: dict[str, Edit] = {
    "an input scale is its amax / 6": times(f"{O_PROJ}.input_scale", factor=448.0),
    "a scale of K is ten times as large": times(f"{ATTENTION}.k_proj.k_scale", factor=10.0),
}
"""What no comparison of weights can tell: how large inputs are is in what a model reads."""
