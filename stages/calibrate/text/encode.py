"""Documents to token ids, as the model's tokenizer makes them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.calibrate.text.texts import Piece
from state.errors import InputError
from state.reasons import reason

GROUP_PIECES = 64
GROUP_CHARACTERS = 1 << 20
SAMPLE = "a"


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """The ids that the tokenizer puts before every text, int32: BOS, or none. The model never sees a text
    without them.
    """
    plain, whole = (_call(tokenizer, [SAMPLE], special)[0] for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if np.array_equal(whole[start : start + len(plain)], plain):
            return whole[:start]
    return whole[:0]


def encode(
    tokenizer: PreTrainedTokenizerBase, prefix: NDArray[np.int32], pieces: Iterator[Piece]
) -> Iterator[NDArray[np.int32]]:
    """Token ids piece by piece, int32, the end-of-text token before every document but the first.

    A document that begins with `prefix` by itself, as chat templates write it, comes without: windows have
    it already.
    """
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
    separator = np.empty(0, dtype=np.int32)
    for group in _groups(pieces):
        for piece, ids in zip(group, _call(tokenizer, [piece.text for piece in group]), strict=True):
            if piece.begins and len(prefix) and np.array_equal(ids[: len(prefix)], prefix):
                ids = ids[len(prefix) :]
            if len(ids):
                yield np.concatenate([separator, ids]) if piece.begins else ids
                separator = end


def _call(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False
) -> list[NDArray[np.int32]]:
    try:
        encoded: Any = tokenizer(
            texts,
            add_special_tokens=special,
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
