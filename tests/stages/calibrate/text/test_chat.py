"""Conversations through chat templates of every kind, with nothing of what they say lost."""

from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stages.calibrate.text.chat import render_chat
from stages.calibrate.text.messages import read_messages
from state.errors import InputError

STRINGS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}{% if m.content is string %}s:{{ m.content }}{% else %}p{% endif %}{% endfor %}"
)


def rendered(template: str, messages: list[Any], tools: list[Any] | None = None) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    return render_chat(tokenizer, read_messages(messages, Counter()), tools)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_absent_and_null_content_is_empty() -> None:
    messages = [said("user", "a"), said("assistant", None), {"role": "tool"}, {"from": "gpt", "value": None}]
    assert rendered(STRINGS, messages) == "<user>a<assistant><tool><assistant>"
    assert rendered(PARTS, messages) == "<user>a<assistant><tool><assistant>"


@pytest.mark.parametrize("template", [STRINGS, PARTS])
def test_content_takes_the_form_that_the_template_takes(template: str) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "two"}]
    assert (
        rendered(template, [said("user", parts), said("assistant", "yes")]) == "<user>one two<assistant>yes"
    )


def test_a_template_for_both_forms_gets_text() -> None:
    assert rendered(BOTH, [said("user", [{"type": "text", "text": "hi"}])]) == "s:hi"


def test_tools_are_passed_on() -> None:
    template = "{% if tools %}{{ tools[0].name }}:{% endif %}" + STRINGS
    assert rendered(template, [said("user", "a")], [{"name": "f"}]) == "f:<user>a"


def test_fields_that_templates_know_are_passed_on() -> None:
    template = STRINGS + "{{ messages[0].tool_calls[0].name }}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "other": None}
    assert rendered(template, [call]) == "<assistant>f"


@pytest.mark.parametrize("content", ["a long message that nothing else holds", "use"])
def test_a_message_that_is_lost_is_named(content: str) -> None:
    template = "{% for m in messages if m.role == 'user' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match=rf"leaves out message 2 \(role system\): '{content}'"):
        rendered(template, [said("user", "hi"), said("system", content)])


def test_what_a_template_writes_as_json_is_there() -> None:
    template = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    content = 'a "quoted" result\nof a tool, long enough'
    assert rendered(template, [said("tool", content)]) == r'"a \"quoted\" result\nof a tool, long enough"'


def test_reasoning_may_be_left_out_as_templates_do() -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert rendered(template, [said("assistant", "<think>long thoughts</think>an answer")]) == "an answer"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("b", "a message without role and content: b"),
        ({"content": "b"}, "a message without role and content"),
        (said("user", 7), "content is int, not text or a list of parts"),
        (said("user", [7]), "a part of a message is int: 7"),
        (said("user", [{"type": "text", "text": 7}]), "the text of a part of a message is int"),
    ],
)
def test_what_is_no_message_is_named(message: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        rendered(STRINGS, [message])
