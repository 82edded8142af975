"""Text becomes one int32 matrix of fixed windows: no padding, nothing truncated."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stages.calibrate.text.chat import render_chat
from stages.calibrate.text.encode import encode, prefix_of
from stages.calibrate.text.left_out import LeftOut
from stages.calibrate.text.texts import Piece, read_documents
from stages.calibrate.text.windows import Stretch, cut, evenly, joined, stretches, thinned
from stages.progress import Progress
from stages.settings import Take
from state.errors import InputError

ROOM = 16
"""Characters of a stretch for each token of the window taken from it; few texts need more."""


def token_matrix(
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    *,
    samples: int,
    seq: int,
    split: str = "train",
    column: str | None = None,
    take: Take = "first",
    progress: Progress,
) -> NDArray[np.int32]:
    """The calibration tokens of `data`: documents in order, the end-of-text token between, cut into windows.

    What the tokenizer puts before a text (BOS) begins every window, once, and counts. A remainder shorter
    than a window is dropped. Too little text is warned about, and so is what of DATA is left out.

    Args:
        tokenizer: of the model.
        data, split, column: see `read_documents`.
        samples: windows wanted. seq: tokens per window.
        take: the first windows, reading no further; or windows spread evenly over the whole of DATA.

    Returns:
        int32 [windows, seq] with 1 <= windows <= samples.

    Raises:
        InputError: there is no text, less than one window of it, or a message list and no chat template.
    """
    prefix = prefix_of(tokenizer)
    body = seq - len(prefix)
    if body < 1:
        raise InputError(
            f"--seq {seq} leaves no token of text beside the {len(prefix)} that the tokenizer puts before it."
        )
    left_out = LeftOut()
    documents = read_documents(
        data, split=split, column=column, render=partial(render_chat, tokenizer), left_out=left_out
    )
    ids = partial(encode, tokenizer, prefix)
    if take == "first":
        tokens = _first(ids(documents), samples * body, progress)
    else:
        tokens = _spread(ids, documents, samples, body, progress)
    for line in left_out.said():
        progress.warn(line)
    if len(tokens) == 0:
        raise InputError(f"DATA {data} holds no text.")
    windows = cut(tokens, prefix, seq)
    if len(windows) == 0:
        raise InputError(
            f"DATA {data} gives {len(tokens):,} tokens, less than one window of {body:,}: "
            f"give more text, or --seq {len(tokens) + len(prefix)}."
        )
    if len(windows) < samples:
        progress.warn(
            f"too little text: {data} gives {len(windows):,} of {samples:,} windows of {seq:,} tokens; "
            "calibrating with these."
        )
    return windows[evenly(len(windows), samples)]


def _first(ids: Iterator[NDArray[np.int32]], wanted: int, progress: Progress) -> NDArray[np.int32]:
    """The first tokens, at most as many as wanted, reading no further."""
    progress.start("tokenize", wanted, "tokens")
    collected = [np.empty(0, dtype=np.int32)]
    missing = wanted
    for some in ids:
        progress.advance(min(len(some), missing))
        collected.append(some[:missing])
        missing -= len(collected[-1])
        if not missing:
            break
    progress.finish()
    return np.concatenate(collected)


def _spread(
    ids: Callable[[Iterator[Piece]], Iterator[NDArray[np.int32]]],
    documents: Iterator[Piece],
    samples: int,
    body: int,
    progress: Progress,
) -> NDArray[np.int32]:
    """Tokens of windows spread over all documents, which are read once: all tokens where they are few, else
    those that begin some stretches of text, each as far from the next.
    """
    progress.stage("reading all of DATA")
    parts, all_of_them = thinned(stretches(documents, ROOM * body), samples)
    progress.stage("tokenizing what was taken of it")
    nothing = np.empty(0, dtype=np.int32)
    if all_of_them:
        return np.concatenate([nothing, *ids(joined(parts))])
    chosen = [*evenly(len(parts), samples), len(parts)]
    begins = [_begin_of_one(ids, parts[at:following], body) for at, following in pairwise(chosen)]
    return np.concatenate([nothing, *begins])


def _begin_of_one(
    ids: Callable[[Iterator[Piece]], Iterator[NDArray[np.int32]]], parts: list[Stretch], body: int
) -> NDArray[np.int32]:
    """The first `body` tokens of the first stretch that has so many; none where none has."""
    for part in parts:
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *ids(iter(part.pieces))])
        if len(tokens) >= body:
            return tokens[:body]
    return np.empty(0, dtype=np.int32)
