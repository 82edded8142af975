"""Chat messages to text, through the model's chat template, with nothing of what they say lost."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.calibrate.text.messages import Message
from state.errors import InputError
from state.reasons import reason

BY_CHANCE = 20
"""Characters of a text that may well be in a rendering although its message is not."""

THOUGHT = "</think>"
"""Ends a model's reasoning, which templates leave out of all turns but the last, as the model is used."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None) -> str:
    """The text that a model sees of a conversation.

    Contents are given as text; where the template has no use for that, as lists of one part.

    Raises:
        InputError: there is no template, it refuses the conversation, or it leaves out what a message says.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat messages, and the model's tokenizer has no chat template to write them with. "
            "Use an instruction-tuned model's tokenizer, or give plain text (--column names a text column)."
        )
    refused: InputError | None = None
    for as_parts in (False, True):
        try:
            return _complete(tokenizer, messages, tools, as_parts)
        except InputError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _complete(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None, as_parts: bool
) -> str:
    """The rendering, in which every message's text is."""
    contents = [str(message["content"]) for message in messages]
    text = _render(tokenizer, messages, contents, tools, as_parts)
    lost = [number for number, content in enumerate(contents) if not _holds(text, content)]
    if not lost and any(0 < len(content.strip()) < BY_CHANCE for content in contents):
        # Short ones may be there by chance: a mark in each one's place can't be.
        marks = [
            f"mark{number}x{len(text)}end" if content.strip() else content
            for number, content in enumerate(contents)
        ]
        marked = _render(tokenizer, messages, marks, tools, as_parts)
        lost = [number for number, mark in enumerate(marks) if mark not in marked]
    if lost:
        role, said = messages[lost[0]]["role"], contents[lost[0]]
        raise InputError(
            f"the tokenizer's chat template leaves out message {lost[0] + 1} (role {role}): {said[:60]!r}. "
            "Take out what it has no place for, or give the text that the model should see."
        )
    return text


def _holds(text: str, content: str) -> bool:
    """Whether a rendering holds what a message says: its answer, as it is or as JSON writes it."""
    answer = content.rpartition(THOUGHT)[2].strip()
    return answer in text or json.dumps(answer, ensure_ascii=False)[1:-1] in text


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    contents: Sequence[str],
    tools: list[Any] | None,
    as_parts: bool,
) -> str:
    given = [
        {**message, "content": [{"type": "text", "text": content}] if as_parts else content}
        for message, content in zip(messages, contents, strict=True)
    ]
    try:
        return str(tokenizer.apply_chat_template(given, tools=tools, tokenize=False))
    except Exception as error:  # templates raise jinja2 errors, and whatever their code raises
        raise InputError(
            f"the tokenizer's chat template refuses this conversation: {reason(error)}"
        ) from error
