"""The token matrix, with a tokenizer that makes one token of each word."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stages.calibrate.text.tokens import token_matrix
from stages.progress import Silent
from state.errors import InputError

VOCABULARY = {"<end>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "<begin>": 5}


class Heard(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.advanced = 0

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def advance(self, amount: int, **facts: int) -> None:
        self.advanced += amount


def make_tokenizer(**settings: object) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # A post-processor that would begin every document, as Llama's does.
    words.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 5)])
    words.enable_truncation(2)
    words.enable_padding()
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"eos_token": "<end>", **settings})


def write(tmp_path: Path, *documents: str) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def test_documents_are_joined_by_the_end_token_and_cut_into_windows(tmp_path: Path) -> None:
    data = write(tmp_path, "a b", "c", "d d d d")
    heard = Heard()
    tokens = token_matrix(make_tokenizer(), data, samples=2, seq=4, progress=heard)
    np.testing.assert_array_equal(tokens, [[1, 2, 0, 3], [0, 4, 4, 4]])
    assert tokens.dtype == np.int32
    assert (heard.warnings, heard.advanced) == ([], 8)


def test_too_little_text_gives_whole_windows_and_a_warning(tmp_path: Path) -> None:
    heard = Heard()
    data = write(tmp_path, "a b c", "d d")
    tokens = token_matrix(make_tokenizer(), data, samples=8, seq=2, progress=heard)
    np.testing.assert_array_equal(tokens, [[1, 2], [3, 0], [4, 4]])
    assert heard.warnings == [
        f"too little text: {data} gives 3 of 8 windows of 2 tokens; calibrating with these."
    ]


def test_reading_stops_when_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.calibrate.text.tokens.GROUP_PIECES", 1)
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a b c d"}\nthis line is never reached\n')
    tokens = token_matrix(make_tokenizer(), str(path), samples=1, seq=4, progress=Silent())
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 4]])


def test_grouping_for_the_tokenizer_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path, *["a b c"] * 50)
    at_once = token_matrix(make_tokenizer(), data, samples=9, seq=7, progress=Silent())
    monkeypatch.setattr("stages.calibrate.text.tokens.GROUP_PIECES", 3)
    np.testing.assert_array_equal(
        token_matrix(make_tokenizer(), data, samples=9, seq=7, progress=Silent()), at_once
    )


def test_a_long_file_has_no_end_token_between_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.calibrate.text.texts.PIECE", 2)
    (tmp_path / "1.txt").write_text("a\nb\nc\n")
    (tmp_path / "2.txt").write_text("d\n")
    tokens = token_matrix(make_tokenizer(), str(tmp_path), samples=1, seq=5, progress=Silent())
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 0, 4]])


def test_without_an_end_token_documents_follow_each_other(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(eos_token=None)
    tokens = token_matrix(tokenizer, write(tmp_path, "a", "b"), samples=1, seq=2, progress=Silent())
    np.testing.assert_array_equal(tokens, [[1, 2]])


@pytest.mark.parametrize("documents", [(), ("",), ("", "  ", "  ")])
def test_empty_text_is_refused(tmp_path: Path, documents: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"text\.jsonl holds no text"):
        token_matrix(make_tokenizer(), write(tmp_path, *documents), samples=1, seq=1, progress=Silent())


def test_less_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gives 3 tokens, less than one window of 4: .* --seq 3"):
        token_matrix(make_tokenizer(), write(tmp_path, "a b c"), samples=1, seq=4, progress=Silent())


def test_chat_messages_are_written_by_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "b", "content": "d"}]})
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} c {% endfor %}"
    tokens = token_matrix(tokenizer, str(path), samples=1, seq=4, progress=Silent())
    np.testing.assert_array_equal(tokens, [[1, 3, 4, 3]])


def test_chat_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(InputError, match=r"chat\.jsonl:1: .* no chat template"):
        token_matrix(make_tokenizer(), str(path), samples=1, seq=1, progress=Silent())


def test_a_template_that_refuses_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="refuses this conversation: roles must alternate"):
        token_matrix(tokenizer, str(path), samples=1, seq=1, progress=Silent())
