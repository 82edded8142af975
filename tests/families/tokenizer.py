"""A tokenizer of 320 tokens, made offline."""

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
TOKENS = 320
TEXT = (
    "The same words come back again and again, so that a tokenizer of a few hundred tokens learns something "
    "from them. A model that is calibrated on a text sees each of its tokens once, and what it saw is kept. "
)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer: tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_text(file: Path, documents: int = 24) -> None:
    """A JSONL file of documents that differ."""
    words = TEXT.split()
    lines = []
    for number in range(documents):
        turned = words[number:] + words[:number]
        lines.append(json.dumps({"text": " ".join(turned[:: 1 + number % 3])}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


@functools.cache
def _tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    text: str = tokenizer.to_str()
    return text
