"""Documents from every form of DATA, and one clear line for each that is unusable."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from stages.calibrate.text.files import DataUnreachable
from stages.calibrate.text.left_out import LeftOut
from stages.calibrate.text.messages import Message
from stages.calibrate.text.texts import Piece, read_documents
from state.errors import InputError


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def render(messages: list[Message], tools: list[Any] | None) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in messages)


def pieces(data: Path | str, column: str | None = None, split: str = "train", **given: Any) -> list[Piece]:
    given = {"render": render, "left_out": LeftOut(), **given}
    return list(read_documents(str(data), split=split, column=column, **given))


def texts(data: Path | str, column: str | None = None, split: str = "train", **given: Any) -> list[str]:
    return [piece.text for piece in pieces(data, column, split, **given)]


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
    with pytest.raises(InputError, match=r"chat\.jsonl:2: a message without role and content: b"):
        texts(data)


def test_a_refused_conversation_is_named_by_line(tmp_path: Path) -> None:
    def refuse(messages: list[Message], tools: list[Any] | None) -> str:
        raise InputError("no template")

    data = write_jsonl(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(InputError, match=r"chat\.jsonl:1: no template"):
        texts(data, render=refuse)


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
    (tmp_path / "a.txt").write_text("one\ntwo\nsix\n", encoding="utf-8")
    read = pieces(tmp_path / "a.txt")
    assert [piece.begins for piece in read] == [True] + [False] * (len(read) - 1)
    assert len(read) > 1
    assert "".join(piece.text for piece in read) == "one\ntwo\nsix\n"


@pytest.mark.parametrize("name", ["missing.jsonl", "none-*.txt", "./missing"])
def test_a_missing_file_is_no_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataUnreachable, match=r"no such file|no file matches"):
        texts(name)


class Streamed(list[dict[str, Any]]):
    """Stands for a data set that is streamed."""

    def __init__(self, *rows: dict[str, Any], known: int | None = None) -> None:
        super().__init__(rows)
        splits = {"test": SimpleNamespace(num_examples=known)} if known else None
        self.info = SimpleNamespace(splits=splits)

    def decode(self, enable: bool) -> "Streamed":
        assert not enable
        return self


def stream(monkeypatch: pytest.MonkeyPatch, rows: Streamed) -> list[tuple[object, ...]]:
    asked = []

    def load_dataset(name: str, config: str | None, streaming: bool) -> dict[str, Streamed]:
        asked.append((name, config, streaming))
        return {"test": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_a_data_set_is_read_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stream(monkeypatch, Streamed({"text": "one"}))
    assert texts("org/wiki:raw", split="test") == ["one"]
    assert asked == [("org/wiki", "raw", True)]


def test_a_data_set_without_the_split_is_not_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    stream(monkeypatch, Streamed({"text": "one"}))
    with pytest.raises(InputError, match=r"DATA wiki holds no split train, but test\. .*--split") as raised:
        texts("wiki")
    assert not isinstance(raised.value, DataUnreachable)


def test_rows_of_a_data_set_by_number_and_by_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": str(number)} for number in range(10)]
    stream(monkeypatch, Streamed(*rows, known=10))
    assert texts("wiki", split="test[2:4]") == ["2", "3"]
    assert texts("wiki", split="test[-20%:]") == ["8", "9"]
    stream(monkeypatch, Streamed(*rows))
    assert texts("wiki", split="test[:2]") == ["0", "1"]
    with pytest.raises(InputError, match=r"how many rows it has\. .* --split test\[:1000\]"):
        texts("wiki", split="test[:20%]")


def test_a_data_set_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_args: object, **_options: object) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataUnreachable, match=r"DATA wiki: no such file here, .* failed: no network DATA is"):
        texts("wiki")


def test_rows_of_files_count_over_all_files_of_the_split(tmp_path: Path) -> None:
    for name, numbers in {"a": range(6), "b": range(6, 10)}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", *({"text": str(number)} for number in numbers))
    assert texts(tmp_path, split="train[:2]") == ["0", "1"]
    assert texts(tmp_path, split="train[5:8]") == ["5", "6", "7"]
    assert texts(tmp_path, split="train[50%:90%]") == ["5", "6", "7", "8"]
    assert texts(tmp_path, split="train[-1:]") == ["9"]
    assert texts(tmp_path / "b.jsonl", split="train[:25%]") == ["6"]


def test_prose_has_no_rows_to_choose(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match=r"--split train\[:10%\]: .* is prose, which has no rows"):
        texts(tmp_path, split="train[:10%]")


def test_rows_that_are_null_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"body": None, "id": 1}, {"body": "one", "id": 2}, {"body": None, "id": 3}]
    left_out = LeftOut()
    assert texts(write_jsonl(tmp_path / "a.jsonl", *rows), left_out=left_out) == ["one"]
    assert left_out.said() == ["2 of the 3 rows read hold null and no text; they are left out"]
    left_out = LeftOut()
    data = write_jsonl(tmp_path / "b.jsonl", {"messages": None}, {"messages": []}, {"text": "not looked at"})
    with pytest.raises(InputError, match=r"b\.jsonl:3: no column 'messages', but 'text'"):
        texts(data, left_out=left_out)
    assert left_out.nulls == 2


def test_tools_reach_the_template_as_a_list(tmp_path: Path) -> None:
    seen = []

    def keep(messages: list[Message], tools: list[Any] | None) -> str:
        seen.append(tools)
        return "text"

    messages = [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}
    tables = [[tool], json.dumps([tool]), None, [], ""]
    data = write_jsonl(tmp_path / "a.jsonl", *({"messages": messages, "tools": tools} for tools in tables))
    texts(data, render=keep)
    assert seen == [[tool], [tool], None, None, None]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{", r"a\.jsonl:1: the column 'tools' is not JSON"),
        ({"a": 1}, r"a\.jsonl:1: .* holds dict, not a list"),
    ],
)
def test_tools_that_are_none_are_named(tmp_path: Path, tools: object, message: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    with pytest.raises(InputError, match=message):
        texts(write_jsonl(tmp_path / "a.jsonl", row))


def test_images_are_left_out_and_said(tmp_path: Path) -> None:
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "what"},
        {"type": "text", "text": "?"},
    ]
    row = {"messages": [{"role": "user", "content": parts}], "images": ["a.png"]}
    left_out = LeftOut()
    assert texts(write_jsonl(tmp_path / "a.jsonl", row, row), left_out=left_out) == ["user:what?"] * 2
    assert left_out.said() == [
        "parts of messages that are no text are left out: 2 of type image",
        "calibration is on text: what is in images of DATA is left out",
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert pieces(tmp_path / "a.txt") == [Piece("one")]


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


def test_what_datasets_saved_is_read_split_by_split(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == ["train"]
    assert texts(tmp_path / "saved", split="test") == ["test"]
