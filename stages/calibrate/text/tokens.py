"""Text becomes one int32 matrix of fixed windows: no padding, nothing truncated."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.calibrate.text.texts import Piece, read_documents
from stages.progress import Progress
from state.errors import InputError
from state.reasons import reason

GROUP_PIECES = 64
GROUP_CHARACTERS = 1 << 20


def token_matrix(
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    *,
    samples: int,
    seq: int,
    split: str = "train",
    column: str | None = None,
    progress: Progress,
) -> NDArray[np.int32]:
    """The calibration tokens of `data`: documents in order, the end-of-text token between, cut into windows.

    Reading stops as soon as samples * seq tokens are there; a remainder shorter than a window is dropped. Too
    little text is warned about.

    Args:
        tokenizer: of the model; adds no special tokens of its own here.
        data, split, column: see `read_documents`.
        samples: windows wanted. seq: tokens per window.

    Returns:
        int32 [windows, seq] with 1 <= windows <= samples.

    Raises:
        InputError: there is no text, less than one window of it, or a message list and no chat template.
    """
    wanted = samples * seq
    progress.start("tokenize", wanted, "tokens")
    collected: list[NDArray[np.int32]] = []
    count = 0
    documents = read_documents(data, split=split, column=column, render=partial(_render, tokenizer))
    for ids in _encode(tokenizer, documents):
        progress.advance(min(len(ids), wanted - count))
        collected.append(ids)
        count += len(ids)
        if count >= wanted:
            break
    progress.finish()
    if count == 0:
        raise InputError(f"DATA {data} holds no text.")
    windows = min(count // seq, samples)
    if windows == 0:
        raise InputError(
            f"DATA {data} gives {count:,} tokens, less than one window of {seq:,}: "
            f"give more text, or --seq {count}."
        )
    if windows < samples:
        progress.warn(
            f"too little text: {data} gives {windows:,} of {samples:,} windows of {seq:,} tokens; "
            "calibrating with these."
        )
    return np.concatenate(collected)[: windows * seq].reshape(windows, seq)


def _encode(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[Piece]) -> Iterator[NDArray[np.int32]]:
    """Token ids piece by piece, the end-of-text token before every document but the first."""
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
    separator = np.empty(0, dtype=np.int32)
    for group in _groups(pieces):
        for piece, ids in zip(group, _token_ids(tokenizer, group), strict=True):
            if len(ids):
                yield np.concatenate([separator, ids]) if piece.begins else ids
                separator = end


def _token_ids(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> list[NDArray[np.int32]]:
    try:
        encoded = tokenizer(
            [piece.text for piece in pieces],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    except Exception as error:  # what a tokenizer does with odd settings of its own, only it knows
        raise InputError(
            f"the model's tokenizer fails on this text: {reason(error)}. Are its files whole, and the "
            "model's own?"
        ) from error


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups large enough for the tokenizer to work on in parallel, small enough to stop early."""
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        if not piece.text:
            continue
        group.append(piece)
        characters += len(piece.text)
        if len(group) == GROUP_PIECES or characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat messages, and the model's tokenizer has no chat template to write them with. "
            "Use an instruction-tuned model's tokenizer, or give plain text (--column names a text column)."
        )
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise jinja2 errors, and whatever their code raises
        raise InputError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    return str(text)
