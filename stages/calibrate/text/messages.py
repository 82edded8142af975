"""Chat messages as people keep them, to one form: a role, a content that is text, and what else they hold."""

from collections import Counter
from typing import Any

from state.errors import InputError

Message = dict[str, Any]
"""`role` and `content`, which is a str, and fields such as `tool_calls` that templates know."""

SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""


def read_messages(value: list[Any], left_out: Counter[str]) -> list[Message]:
    """Messages as {"role", "content"}; ShareGPT's {"from", "value"} is translated, null and absent content
    is "", and parts of type text are joined.

    left_out: counts the parts of other types, such as image.

    Raises:
        InputError: something is no message, has no role, or a content that is neither text nor parts.
    """
    return [_message(message, left_out) for message in value]


def _message(message: Any, left_out: Counter[str]) -> Message:
    if isinstance(message, dict) and message.get("role") is not None:
        given = {name: value for name, value in message.items() if value is not None}
        return {**given, "content": _text(message.get("content"), left_out)}
    if isinstance(message, dict) and message.get("from") is not None:
        role = SPEAKERS.get(str(message["from"]), message["from"])
        return {"role": role, "content": _text(message.get("value"), left_out)}
    raise InputError(f"a message without role and content: {str(message)[:60]}")


def _text(content: Any, left_out: Counter[str]) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"a message's content is {type(content).__name__}, not text or a list of parts")
    return "".join(_part(part, left_out) for part in content)


def _part(part: Any, left_out: Counter[str]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InputError(f"a part of a message is {type(part).__name__}: {str(part)[:60]}")
    kind = part.get("type", "text")
    if kind != "text":
        left_out[str(kind)] += 1
        return ""
    text = part.get("text")
    if text is None or isinstance(text, str):
        return text or ""
    raise InputError(f"the text of a part of a message is {type(text).__name__}, not text")
