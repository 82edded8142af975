"""Makes a tiny mixture-of-experts model and calibration text, offline: `python -m pipeline.demo FOLDER`.

The model is a Qwen3-MoE with random weights, in the layout of the hub; the text is from the Python standard
library. The same Python version and libraries make the same bytes.
"""

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
TEXTS = ("argparse", "ast", "cmd", "configparser", "csv", "dataclasses", "difflib", "enum", "functools")
UNREACHED_EXPERT = (1, 5)  # layer and expert whose router row is zero: real text leaves experts out as well
DEAD_CHANNEL = (2, 17)  # layer and channel that its second norm sets to zero, as pruned models have them

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,
}


def make_demo(folder: Path) -> None:
    """Writes FOLDER/model (Hugging Face layout, with tokenizer) and FOLDER/text.jsonl (a document a line)."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    documents = collect_documents()
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    write_tokenizer(model, documents)
    save_file(make_weights(), model / "model.safetensors", metadata={"format": "pt"})
    # The config comes last: a folder that has one is complete.
    (model / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def collect_documents() -> list[str]:
    """The sources of some standard library modules, about 100,000 tokens of the demo's tokenizer."""
    library = Path(sysconfig.get_path("stdlib"))
    return [(library / f"{name}.py").read_text(encoding="utf-8") for name in TEXTS]


def write_tokenizer(folder: Path, documents: list[str]) -> None:
    """A byte-level BPE tokenizer of CONFIG["vocab_size"] tokens, trained on the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of every tensor of the model."""
    hidden, width, head = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (CONFIG["vocab_size"], hidden),
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{prefix}.self_attn.{norm}.weight"] = (head,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (queries, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{prefix}.mlp.gate.weight"] = (CONFIG["num_experts"], hidden)
        for expert in range(CONFIG["num_experts"]):
            shapes[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = (width, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = (width, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    return shapes


def make_weights() -> dict[str, torch.Tensor]:
    """Hub name -> bfloat16 tensor. Matrices keep the variance of their input; norms lie around one."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in weight_shapes().items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.2 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5).to(torch.bfloat16)
    layer, expert = UNREACHED_EXPERT
    weights[f"model.layers.{layer}.mlp.gate.weight"][expert] = 0
    layer, channel = DEAD_CHANNEL
    weights[f"model.layers.{layer}.post_attention_layernorm.weight"][channel] = 0
    return weights


if __name__ == "__main__":
    make_demo(Path(sys.argv[1]))
    print(f"made a tiny model and text in {sys.argv[1]}")
