"""Keys that most config.json have, with the values of the tiny models."""

from typing import Any

from tests.families.blocks import EXPERT_WIDTH, EXPERTS, HEAD, HIDDEN, VOCABULARY, WIDTH

Config = dict[str, Any]


def sizes(layers: int, **more: Any) -> Config:
    """What every decoder's config says: sizes, and that its weights are bfloat16."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-06,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    } | more


def causal(model_type: str, architecture: str, layers: int, **more: Any) -> Config:
    """The config.json of a text model, whose theta is a key of its own as the hub's files have it."""
    own = {"model_type": model_type, "architectures": [architecture], "rope_theta": 50000.0}
    return own | sizes(layers, **more)


MOE: Config = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_WIDTH,
    "norm_topk_prob": True,
}

TOKENS = {
    "image_token_id": 380,
    "video_token_id": 381,
    "vision_start_token_id": 378,
    "vision_end_token_id": 379,
}
PREPROCESSOR = {"preprocessor_config.json": '{"do_resize": true, "patch_size": 4}\n'}


def wrapper(model_type: str, architecture: str, text: Config, vision: Config, **more: Any) -> Config:
    """A config.json with a text and a vision part."""
    own = {"model_type": model_type, "architectures": [architecture]}
    return own | {"text_config": text, "vision_config": vision, "torch_dtype": "bfloat16"} | more
