"""Documents from every form of DATA, and one clear line for each that is unusable."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stages.calibrate.text.texts import DataUnreachable, Piece, read_documents
from state.errors import InputError


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def render(messages: list[dict[str, str]]) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in messages)


def texts(data: Path | str, column: str | None = None, split: str = "train") -> list[str]:
    return [piece.text for piece in read_documents(str(data), split=split, column=column, render=render)]


def test_jsonl_gives_its_text_column_in_order(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", {"id": "x", "text": "one"}, {"id": "y", "text": "two"})
    assert texts(data) == ["one", "two"]


def test_the_only_column_of_strings_is_the_text(tmp_path: Path) -> None:
    assert texts(write_jsonl(tmp_path / "a.jsonl", {"id": 7, "body": "one"})) == ["one"]


def test_several_columns_of_strings_need_a_choice(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: which column is the text: 'question', 'answer'\?.*--column"
    ):
        texts(data)
    assert texts(data, column="answer") == ["a"]


def test_messages_go_through_the_template(tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "chat.jsonl",
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    )
    assert texts(data) == ["user:hi|assistant:yes"]


def test_sharegpt_conversations_are_messages_too(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes"},
        {"from": "tool", "value": "7"},
    ]
    data = write_jsonl(tmp_path / "chat.jsonl", {"conversations": turns})
    assert texts(data) == ["user:hi|assistant:yes|tool:7"]


def test_a_message_without_role_is_named_by_line(tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "a"}]}, {"messages": ["b"]}
    )
    with pytest.raises(
        InputError, match=r"chat\.jsonl:2: 'messages' holds a message without role and content: b"
    ):
        texts(data)


def test_a_refused_conversation_is_named_by_line(tmp_path: Path) -> None:
    def refuse(messages: list[dict[str, str]]) -> str:
        raise InputError("no template")

    data = write_jsonl(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(InputError, match=r"chat\.jsonl:1: no template"):
        list(read_documents(str(data), split="train", column=None, render=refuse))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "one"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        (b'["one"]\n', r"a\.jsonl:1: a JSON object is needed, here is list"),
        (b'{"text": "one"}\n\n{"body": "two"}\n', r"a\.jsonl:3: no column 'text', but 'body'"),
        (b'{"text": 7}\n', r"a\.jsonl:1: column 'text' holds int"),
        (b'{"text": "\xff"}\n', r"a\.jsonl: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts(tmp_path / "a.jsonl")


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "two"]


def test_parquet_with_messages(tmp_path: Path) -> None:
    table = pyarrow.table({"messages": [[{"role": "user", "content": "hi", "name": None}]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["user:hi"]


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"a\.parquet: not readable as Parquet"):
        texts(tmp_path / "a.parquet")


def test_a_plain_file_is_one_document_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.calibrate.text.texts.PIECE", 4)
    (tmp_path / "a.py").write_text("one\ntwo\nsix\n", encoding="utf-8")
    pieces = list(read_documents(str(tmp_path / "a.py"), split="train", column=None, render=render))
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == "one\ntwo\nsix\n"


def test_folders_and_globs_are_sorted_by_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "sub" / "b.txt").write_text("middle")
    write_jsonl(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert texts(tmp_path) == ["first", "middle", "last"]
    assert texts(tmp_path / "*.txt") == ["last"]
    assert texts(tmp_path / "**" / "*.txt") == ["middle", "last"]


@pytest.mark.parametrize("name", ["missing.jsonl", "none-*.txt", "./missing"])
def test_a_missing_file_is_no_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataUnreachable, match=r"no such file|no file matches"):
        texts(name)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.jsonl, .* file is in this folder"):
        texts(tmp_path)


def test_a_data_set_is_read_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": "one"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("org/wiki:raw", split="test") == ["one"]
    assert asked == [("org/wiki", "raw", "test", True)]


def test_a_data_set_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_args: object, **_options: object) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataUnreachable, match=r"DATA wiki: no such file here, .* failed: no network DATA is"):
        texts("wiki")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert list(read_documents(str(tmp_path / "a.txt"), split="train", column=None, render=render)) == [
        Piece("one")
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "ab \\\\ud800 c"}', r"a\.jsonl:1: .* is half of a character"),
        ('{"text": ' + "1" * 5000 + "}", r"a\.jsonl:1: not JSON \(Exceeds the limit"),
        ('{"text": ' + "[" * 100_000 + "}", r"a\.jsonl:1: not JSON \(maximum recursion depth"),
        ('{"text": "' + "abc " * (6 << 20) + '"}', r"a\.jsonl:1: a text of more than 8,388,608 characters"),
        ('{"conversations": [{"from": ["x"], "value": "y"}]}', None),
    ],
    ids=["half a character", "digits", "nested", "24 MB", "a list for a speaker"],
)
def test_odd_records_are_named_in_one_line(tmp_path: Path, line: str, message: str | None) -> None:
    (tmp_path / "a.jsonl").write_text(line.replace("\\\\", "\\") + "\n")
    if message is None:
        assert texts(tmp_path / "a.jsonl")
        return
    with pytest.raises(InputError, match=message) as raised:
        texts(tmp_path / "a.jsonl")
    assert len(str(raised.value).splitlines()) == 1


def test_a_line_without_end_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 24_000_000)
    with pytest.raises(InputError, match=r"a\.txt:1: a text of more than 8,388,608 characters"):
        texts(tmp_path / "a.txt")


def test_an_error_while_reading_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            raise OSError(116, "Stale file handle")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(Path, "open", lambda *_given, **_named: Stale())
    with pytest.raises(OSError, match="Stale file handle") as raised:
        texts(tmp_path / "a.txt")
    assert raised.value.filename == str(tmp_path / "a.txt")
