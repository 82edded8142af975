"""Parts that many families share, in the names that their checkpoints have."""

from tests.families.layout import Fused, Layout

HIDDEN = 64
VOCABULARY = 384
HEAD = 16
QUERIES = 4 * HEAD
KEYS = 2 * HEAD
WIDTH = 96
EXPERT_WIDTH = 96  # gate and up together are no square with the hidden state: a transposition shows
EXPERTS = 4


def ends(layout: Layout, model: str = "model", head: str | None = "lm_head", around: float = 1.0) -> None:
    """The table of tokens, the last norm and, where it is not tied, the head."""
    layout.embedding(f"{model}.embed_tokens", VOCABULARY, HIDDEN)
    layout.norm(f"{model}.norm", HIDDEN, around=around)
    if head:
        layout.linear(head, VOCABULARY, HIDDEN)


def norms(layout: Layout, prefix: str, *names: str, around: float = 1.0, bias: bool = False) -> None:
    """Norms of the hidden state."""
    for name in names:
        layout.norm(f"{prefix}.{name}", HIDDEN, around=around, bias=bias)


def attention(
    layout: Layout,
    prefix: str,
    *,
    bias: bool = False,
    out_bias: bool = False,
    head_norms: float | None = None,
    queries: int = QUERIES,
    keys: int = KEYS,
    head: int = HEAD,
) -> None:
    """q, k, v and o; `head_norms` is what the weights of q_norm and k_norm lie around."""
    layout.linear(f"{prefix}.q_proj", queries, HIDDEN, bias)
    layout.linear(f"{prefix}.k_proj", keys, HIDDEN, bias)
    layout.linear(f"{prefix}.v_proj", keys, HIDDEN, bias)
    layout.linear(f"{prefix}.o_proj", HIDDEN, queries // 2 if queries > 2 * QUERIES else queries, out_bias)
    if head_norms is not None:
        layout.norm(f"{prefix}.q_norm", head, around=head_norms)
        layout.norm(f"{prefix}.k_norm", head, around=head_norms)


def latent_attention(layout: Layout, prefix: str, low_rank_queries: bool = True) -> None:
    """DeepSeek's multi-head latent attention: heads of 16 + 16 for queries and keys, 16 for values."""
    if low_rank_queries:
        layout.linear(f"{prefix}.q_a_proj", 48, HIDDEN)
        layout.norm(f"{prefix}.q_a_layernorm", 48)
        layout.linear(f"{prefix}.q_b_proj", 4 * 32, 48)
    else:
        layout.linear(f"{prefix}.q_proj", 4 * 32, HIDDEN)
    layout.linear(f"{prefix}.kv_a_proj_with_mqa", 32 + 16, HIDDEN)
    layout.norm(f"{prefix}.kv_a_layernorm", 32)
    layout.linear(f"{prefix}.kv_b_proj", 4 * 32, 32)
    layout.linear(f"{prefix}.o_proj", HIDDEN, 4 * 16)


LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def mlp(layout: Layout, prefix: str, width: int = WIDTH, bias: bool = False) -> None:
    """gate, up and down."""
    layout.linear(f"{prefix}.gate_proj", width, HIDDEN, bias)
    layout.linear(f"{prefix}.up_proj", width, HIDDEN, bias)
    layout.linear(f"{prefix}.down_proj", HIDDEN, width, bias)


def experts(
    layout: Layout, prefix: str, count: int = EXPERTS, names: tuple[str, str, str] | None = None
) -> None:
    """Experts that the hub stores one by one; `names` of gate, up and down."""
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    for expert in range(count):
        layout.linear(f"{prefix}.{expert}.{gate}", EXPERT_WIDTH, HIDDEN)
        layout.linear(f"{prefix}.{expert}.{up}", EXPERT_WIDTH, HIDDEN)
        layout.linear(f"{prefix}.{expert}.{down}", HIDDEN, EXPERT_WIDTH)


def fused_experts(layout: Layout, prefix: str, *, transposed: bool = False, out: str | None = "") -> None:
    """Experts in two tensors, gate and up one after the other; `out` is the prefix that exports give them,
    the hub's own where it is empty, None where they stay fused."""
    name = None if out is None else (out or prefix) + ".{expert}.{part}"
    both, down = (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN), (EXPERTS, HIDDEN, EXPERT_WIDTH)
    if transposed:
        both, down = (both[0], both[2], both[1]), (down[0], down[2], down[1])
    layout.experts(f"{prefix}.gate_up_proj", both, Fused(("gate_proj", "up_proj"), name, transposed))
    layout.experts(f"{prefix}.down_proj", down, Fused(("down_proj",), name, transposed))


def gated_delta(layout: Layout, prefix: str) -> None:
    """The mixer of Qwen3.5's linear attention: 2 key heads and 4 value heads of 16."""
    layout.linear(f"{prefix}.in_proj_qkv", 2 * 32 + 64, HIDDEN)
    layout.linear(f"{prefix}.in_proj_z", 64, HIDDEN)
    layout.linear(f"{prefix}.in_proj_b", 4, HIDDEN)
    layout.linear(f"{prefix}.in_proj_a", 4, HIDDEN)
    layout.conv(f"{prefix}.conv1d", 128, 1, 4)
    layout.vector(f"{prefix}.dt_bias", 4)
    layout.vector(f"{prefix}.A_log", 4, around=1.0, dtype="float32")
    layout.norm(f"{prefix}.norm", 16, dtype="float32")
    layout.linear(f"{prefix}.out_proj", HIDDEN, 64)


def qwen_tower(layout: Layout, prefix: str, deepstack: bool) -> None:
    """The vision tower of Qwen3-VL and Qwen3.5: one block of width 32, merging 2 x 2 patches."""
    width = 32
    layout.conv(f"{prefix}.patch_embed.proj", width, 3, 2, 4, 4, bias=True)
    layout.embedding(f"{prefix}.pos_embed", 16, width)
    block = f"{prefix}.blocks.0"
    layout.norm(f"{block}.norm1", width, bias=True)
    layout.norm(f"{block}.norm2", width, bias=True)
    layout.linear(f"{block}.attn.qkv", 3 * width, width, bias=True)
    layout.linear(f"{block}.attn.proj", width, width, bias=True)
    layout.linear(f"{block}.mlp.linear_fc1", 64, width, bias=True)
    layout.linear(f"{block}.mlp.linear_fc2", width, 64, bias=True)
    for merger in ("merger", "deepstack_merger_list.0") if deepstack else ("merger",):
        layout.norm(f"{prefix}.{merger}.norm", width if merger == "merger" else 4 * width, bias=True)
        layout.linear(f"{prefix}.{merger}.linear_fc1", 4 * width, 4 * width, bias=True)
        layout.linear(f"{prefix}.{merger}.linear_fc2", HIDDEN, 4 * width, bias=True)


QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
    "hidden_act": "gelu_pytorch_tanh",
}


def siglip_tower(layout: Layout, prefix: str) -> None:
    """A SigLIP tower without its head: one layer of width 32 on 2 x 2 patches."""
    width = 32
    layout.conv(f"{prefix}.embeddings.patch_embedding", width, 3, 4, 4, bias=True)
    layout.embedding(f"{prefix}.embeddings.position_embedding", 4, width)
    layer = f"{prefix}.encoder.layers.0"
    for name in ("layer_norm1", "layer_norm2"):
        layout.norm(f"{layer}.{name}", width, bias=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layout.linear(f"{layer}.self_attn.{name}", width, width, bias=True)
    layout.linear(f"{layer}.mlp.fc1", 64, width, bias=True)
    layout.linear(f"{layer}.mlp.fc2", width, 64, bias=True)
    layout.norm(f"{prefix}.post_layernorm", width, bias=True)


def pixtral_tower(layout: Layout, prefix: str) -> None:
    """A Pixtral tower: one layer of width 32."""
    width = 32
    layout.conv(f"{prefix}.patch_conv", width, 3, 4, 4)
    layout.norm(f"{prefix}.ln_pre", width)
    layer = f"{prefix}.transformer.layers.0"
    for name in ("attention_norm", "ffn_norm"):
        layout.norm(f"{layer}.{name}", width)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layout.linear(f"{layer}.attention.{name}", width, width)
    layout.linear(f"{layer}.feed_forward.gate_proj", 64, width)
    layout.linear(f"{layer}.feed_forward.up_proj", 64, width)
    layout.linear(f"{layer}.feed_forward.down_proj", width, 64)


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "image_size": 16,
    "num_channels": 3,
    "patch_size": 4,
    "rope_theta": 10000.0,
}
