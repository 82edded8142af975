"""Dense text families, most of them Llama's layout with a difference or two."""

from dataclasses import dataclass
from typing import Any

from tests.families.blocks import HIDDEN, VOCABULARY, WIDTH, attention, ends, mlp, norms
from tests.families.configs import Config, causal
from tests.families.layout import Family, Layout

PRE = ("input_layernorm", "post_attention_layernorm")
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Decoder:
    """How a family's layers differ from Llama's. `wide_norms`: q_norm and k_norm over all heads at once."""

    norms: tuple[str, ...] = PRE
    around: float = 1.0
    bias: bool = False
    out_bias: bool = False
    head_norms: float | None = None
    wide_norms: bool = False
    fused: bool = False
    tied: bool = False


def decoder(name: str, model_type: str, architecture: str, how: Decoder | None = None, **more: Any) -> Family:
    """A dense family of two layers; `more` are keys of its config.json, None takes a usual one away."""
    how = how or Decoder()
    layout = Layout()
    ends(layout, head=None if how.tied else "lm_head", around=how.around)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *how.norms, around=how.around)
        decoder_attention(layout, f"{prefix}.self_attn", how)
        if how.fused:
            layout.linear(f"{prefix}.mlp.gate_up_proj", 2 * WIDTH, HIDDEN)
            layout.linear(f"{prefix}.mlp.down_proj", HIDDEN, WIDTH)
        else:
            mlp(layout, f"{prefix}.mlp")
    config = causal(model_type, architecture, 2, tie_word_embeddings=how.tied)
    return Family(name, changed(config, more), layout)


def decoder_attention(layout: Layout, prefix: str, how: Decoder) -> None:
    """q, k, v and o with the family's biases and norms."""
    attention(layout, prefix, bias=how.bias, out_bias=how.out_bias, head_norms=how.head_norms)
    if how.wide_norms:
        layout.norm(f"{prefix}.q_norm", 64)
        layout.norm(f"{prefix}.k_norm", 32)


def changed(config: Config, more: Config) -> Config:
    """The config with other values; a key whose new value is None is taken away."""
    return {key: value for key, value in (config | more).items() if more.get(key, value) is not None}


def llama() -> Family:
    """Llama 3, with the scaling of its rotary embedding as the hub writes it."""
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 32
    return decoder("llama-3", "llama", "LlamaForCausalLM", rope_scaling=scaling, attention_bias=False)


def mistral() -> Family:
    """Mistral 7B with its sliding window."""
    return decoder("mistral", "mistral", "MistralForCausalLM", sliding_window=16)


def qwen2() -> Family:
    """Qwen2.5: biases on q, k and v alone; a tied head as its small models have it."""
    how = Decoder(bias=True, tied=True)
    return decoder("qwen2", "qwen2", "Qwen2ForCausalLM", how, head_dim=None, use_sliding_window=False)


def qwen3() -> Family:
    """Qwen3: norms of each head's q and k."""
    return decoder("qwen3", "qwen3", "Qwen3ForCausalLM", Decoder(head_norms=1.0), attention_bias=False)


def gemma2() -> Family:
    """Gemma 2: (1 + weight) norms on both sides, soft caps, alternating windows, a tied head."""
    how = Decoder(norms=SANDWICH, around=0.0, tied=True)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16}
    acts = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
    return decoder("gemma-2", "gemma2", "Gemma2ForCausalLM", how, sliding_window=16, **caps, **acts)


def gemma3_text() -> Family:
    """Gemma 3 1B: text alone."""
    how = Decoder(norms=SANDWICH, around=0.0, head_norms=0.0, tied=True)
    more = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": None, "query_pre_attn_scalar": 16}
    windows = {"sliding_window": 16, "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0}
    return decoder("gemma-3-text", "gemma3_text", "Gemma3ForCausalLM", how, **more, **windows)


def phi3() -> Family:
    """Phi-3 and Phi-4: q, k and v in one linear, gate and up in another."""
    family = decoder(
        "phi-3", "phi3", "Phi3ForCausalLM", Decoder(fused=True), head_dim=None, sliding_window=None
    )
    fused = Layout()
    for name, tensor in family.layout.tensors.items():
        if name.endswith("q_proj.weight"):
            fused.linear(name.removesuffix(".q_proj.weight") + ".qkv_proj", 128, HIDDEN)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            fused.tensors[name] = tensor
    return Family(family.name, family.config, fused)


def glm4() -> Family:
    """GLM-4 (0414): norms on both sides, gate and up in one linear, biases on q, k and v."""
    around = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    how = Decoder(norms=around, bias=True, fused=True)
    return decoder("glm-4", "glm4", "Glm4ForCausalLM", how, attention_bias=True, partial_rotary_factor=0.5)


def granite() -> Family:
    """Granite 3: multipliers."""
    more = {"embedding_multiplier": 1.5, "residual_multiplier": 0.5, "attention_multiplier": 0.0625}
    more |= {"logits_scaling": 2.0, "head_dim": None}
    return decoder("granite", "granite", "GraniteForCausalLM", Decoder(tied=True), **more)


def olmo3() -> Family:
    """OLMo 3: norms behind attention and MLP alone, q_norm and k_norm over all heads."""
    how = Decoder(norms=POST, wide_norms=True)
    windows = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return decoder("olmo-3", "olmo3", "Olmo3ForCausalLM", how, head_dim=None, **windows)


def exaone4() -> Family:
    """EXAONE 4: norms behind attention and MLP, norms of each head."""
    how = Decoder(norms=POST, head_norms=1.0)
    windows = {"sliding_window": 16, "sliding_window_pattern": "LG"}
    windows["layer_types"] = ["sliding_attention", "full_attention"]
    return decoder("exaone-4", "exaone4", "Exaone4ForCausalLM", how, **windows)


def cohere2() -> Family:
    """Command R7B: attention and MLP beside each other behind one norm, a tied head."""
    how = Decoder(norms=("input_layernorm",), tied=True)
    more = {"layer_norm_eps": 1e-05, "rms_norm_eps": None, "logit_scale": 0.25, "sliding_window": 16}
    windows = {"layer_types": ["sliding_attention", "full_attention"]}
    return decoder("cohere-2", "cohere2", "Cohere2ForCausalLM", how, head_dim=16, **more, **windows)


def smollm3() -> Family:
    """SmolLM3: every other layer without rotary embedding."""
    more = {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "head_dim": None}
    return decoder("smollm-3", "smollm3", "SmolLM3ForCausalLM", Decoder(tied=True), **more)


def seed_oss() -> Family:
    """Seed-OSS: biases on q, k and v."""
    more = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
    return decoder("seed-oss", "seed_oss", "SeedOssForCausalLM", Decoder(bias=True), **more)


def ernie() -> Family:
    """ERNIE 4.5, dense: a tied head."""
    return decoder("ernie-4.5", "ernie4_5", "Ernie4_5ForCausalLM", Decoder(tied=True), use_bias=False)


def hunyuan() -> Family:
    """Hunyuan dense: norms of each head under names of their own."""
    family = decoder("hunyuan-dense", "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", Decoder(tied=True))
    for layer in range(2):
        for name in ("query_layernorm", "key_layernorm"):
            family.layout.norm(f"model.layers.{layer}.self_attn.{name}", 16)
    return family


def starcoder2() -> Family:
    """StarCoder2: LayerNorms and biases everywhere, an MLP without a gate, a tied head."""
    layout = Layout()
    layout.embedding("model.embed_tokens", VOCABULARY, HIDDEN)
    layout.norm("model.norm", HIDDEN, bias=True)
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        norms(layout, prefix, *PRE, bias=True)
        attention(layout, f"{prefix}.self_attn", bias=True, out_bias=True)
        layout.linear(f"{prefix}.mlp.c_fc", WIDTH, HIDDEN, bias=True)
        layout.linear(f"{prefix}.mlp.c_proj", HIDDEN, WIDTH, bias=True)
    more = {"norm_epsilon": 1e-05, "use_bias": True, "tie_word_embeddings": True, "sliding_window": 16}
    more |= {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": None, "head_dim": None}
    config = changed(causal("starcoder2", "Starcoder2ForCausalLM", 2), more)
    return Family("starcoder-2", config, layout)


def opt() -> Family:
    """OPT: learned positions, LayerNorms, ReLU, a tied head."""
    layout = Layout()
    decoder_name = "model.decoder"
    layout.embedding(f"{decoder_name}.embed_tokens", VOCABULARY, HIDDEN)
    layout.embedding(f"{decoder_name}.embed_positions", 128 + 2, HIDDEN)
    layout.norm(f"{decoder_name}.final_layer_norm", HIDDEN, bias=True)
    for layer in range(2):
        prefix = f"{decoder_name}.layers.{layer}"
        norms(layout, prefix, "self_attn_layer_norm", "final_layer_norm", bias=True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layout.linear(f"{prefix}.self_attn.{name}", HIDDEN, HIDDEN, bias=True)
        layout.linear(f"{prefix}.fc1", WIDTH, HIDDEN, bias=True)
        layout.linear(f"{prefix}.fc2", HIDDEN, WIDTH, bias=True)
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return Family("opt", config, layout)


def gpt_neox() -> Family:
    """Pythia: q, k and v in one linear head by head, `embed_out`, a buffer of each layer in the file."""
    layout = Layout()
    layout.embedding("gpt_neox.embed_in", VOCABULARY, HIDDEN)
    layout.norm("gpt_neox.final_layer_norm", HIDDEN, bias=True)
    layout.linear("embed_out", VOCABULARY, HIDDEN)
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}"
        norms(layout, prefix, *PRE, bias=True)
        layout.linear(f"{prefix}.attention.query_key_value", 3 * HIDDEN, HIDDEN, bias=True)
        layout.linear(f"{prefix}.attention.dense", HIDDEN, HIDDEN, bias=True)
        layout.vector(f"{prefix}.attention.rotary_emb.inv_freq", 2, dtype="float32")
        layout.linear(f"{prefix}.mlp.dense_h_to_4h", WIDTH, HIDDEN, bias=True)
        layout.linear(f"{prefix}.mlp.dense_4h_to_h", HIDDEN, WIDTH, bias=True)
    config = causal("gpt_neox", "GPTNeoXForCausalLM", 2)
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta"):
        del config[key]
    config |= {"hidden_act": "gelu", "layer_norm_eps": 1e-05, "rotary_pct": 0.25, "rotary_emb_base": 10000}
    config |= {"use_parallel_residual": True, "bos_token_id": 0}
    return Family("gpt-neox", config, layout, unbuilt=("*.rotary_emb.inv_freq",))


def falcon() -> Family:
    """Falcon 7B: one key head, attention and MLP beside each other, a tied head."""
    layout = Layout()
    layout.embedding("transformer.word_embeddings", VOCABULARY, HIDDEN)
    layout.norm("transformer.ln_f", HIDDEN, bias=True)
    for layer in range(2):
        prefix = f"transformer.h.{layer}"
        norms(layout, prefix, "input_layernorm", bias=True)
        layout.linear(f"{prefix}.self_attention.query_key_value", HIDDEN + 2 * 16, HIDDEN)
        layout.linear(f"{prefix}.self_attention.dense", HIDDEN, HIDDEN)
        layout.linear(f"{prefix}.mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN)
        layout.linear(f"{prefix}.mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN)
    config = {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return Family("falcon", config, layout)
