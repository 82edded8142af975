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


def make_tokenizer(begins: bool = False, **settings: object) -> PreTrainedTokenizerFast:
    """begins: with a post-processor that begins every text, as Llama's does."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        single = "<begin> $A"
        words.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<begin>", 5)])
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
    monkeypatch.setattr("stages.calibrate.text.encode.GROUP_PIECES", 1)
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a b c d"}\nthis line is never reached\n')
    tokens = token_matrix(make_tokenizer(), str(path), samples=1, seq=4, progress=Silent())
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 4]])


def test_grouping_for_the_tokenizer_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path, *["a b c"] * 50)
    at_once = token_matrix(make_tokenizer(), data, samples=9, seq=7, progress=Silent())
    monkeypatch.setattr("stages.calibrate.text.encode.GROUP_PIECES", 3)
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
    with pytest.raises(InputError, match=r"gives 3 tokens, less than one window of 4: .* --seq 4"):
        token_matrix(make_tokenizer(True), write(tmp_path, "a b c"), samples=1, seq=5, progress=Silent())


def test_every_window_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    data = write(tmp_path, "a b", "c", "d d d d")
    tokens = token_matrix(make_tokenizer(True), data, samples=4, seq=4, progress=Silent())
    np.testing.assert_array_equal(tokens, [[5, 1, 2, 0], [5, 3, 0, 4], [5, 4, 4, 4]])


def test_a_window_needs_room_beside_what_begins_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--seq 1 leaves no token of text beside the 1"):
        token_matrix(make_tokenizer(True), write(tmp_path, "a"), samples=1, seq=1, progress=Silent())


@pytest.mark.parametrize("begins", [False, True])
def test_a_rendering_that_has_its_begin_gets_no_second(tmp_path: Path, begins: bool) -> None:
    path = tmp_path / "chat.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": "a b"}]})
    path.write_text(f"{row}\n{row}\n")
    tokenizer = make_tokenizer(begins)
    tokenizer.chat_template = "<begin> {% for message in messages %}{{ message.content }} c {% endfor %}"
    tokens = token_matrix(tokenizer, str(path), samples=9, seq=4, progress=Silent())
    expected = [[5, 1, 2, 3], [5, 0, 1, 2]] if begins else [[5, 1, 2, 3], [0, 5, 1, 2]]
    np.testing.assert_array_equal(tokens, expected)


def test_windows_are_spread_over_all_of_a_small_text(tmp_path: Path) -> None:
    data = write(tmp_path, "a " * 12, "b " * 5, "c " * 5)
    both = {
        take: token_matrix(make_tokenizer(), data, samples=3, seq=4, take=take, progress=Silent())
        for take in ("first", "spread")
    }
    np.testing.assert_array_equal(both["first"], [[1] * 4] * 3)
    # Of six windows the first, the third and the fifth.
    np.testing.assert_array_equal(both["spread"], [[1] * 4, [1] * 4, [2, 2, 0, 3]])


@pytest.mark.parametrize("begins", [False, True])
def test_windows_are_spread_over_all_of_a_large_text(tmp_path: Path, begins: bool) -> None:
    data = write(tmp_path, "a " * 5000, "b " * 5000, "c " * 5000, "d " * 5000)
    tokens = token_matrix(make_tokenizer(begins), data, samples=8, seq=4, take="spread", progress=Silent())
    assert tokens.shape == (8, 4)
    counts = np.bincount(tokens[:, -1], minlength=5)
    assert counts[0] == 0 and (counts[1:] >= 1).all() and (counts[1:] <= 3).all()
    assert not begins or (tokens[:, 0] == 5).all()


def test_too_little_text_to_spread_gives_all_windows(tmp_path: Path) -> None:
    heard = Heard()
    tokens = token_matrix(
        make_tokenizer(), write(tmp_path, "a b c", "d d"), samples=8, seq=2, take="spread", progress=heard
    )
    np.testing.assert_array_equal(tokens, [[1, 2], [3, 0], [4, 4]])
    assert len(heard.warnings) == 1


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a b"}\n{"text": null}\n')
    heard = Heard()
    token_matrix(make_tokenizer(), str(path), samples=1, seq=2, take="spread", progress=heard)
    assert heard.warnings == ["1 of the 2 rows read hold null and no text; they are left out"]


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
