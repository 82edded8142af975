"""Rows out of every kind of file, plain and compressed, and one clear line for each that is malformed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from stages.calibrate.text import tables
from stages.calibrate.text.tables import count_rows, read_rows
from state.errors import InputError

ROWS = [{"text": "one\ntwo"}, {"text": 'a "quoted", word é'}]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows in the form that the suffix names, without compression."""
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text('text\n"one\ntwo"\n"a ""quoted"", word é"\n')
    elif path.suffix == ".tsv":
        path.write_text('text\tn\n"one\ntwo"\t1\n"a ""quoted"", word é"\t2\n')
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


def compress(path: Path, suffix: str) -> Path:
    """The file compressed, in two frames one behind the other."""
    data, packed = path.read_bytes(), path.with_name(path.name + suffix)
    halves = (data[: len(data) // 2], data[len(data) // 2 :])
    if suffix.lower() == ".gz":
        packed.write_bytes(b"".join(map(gzip.compress, halves)))
    else:
        packed.write_bytes(b"".join(pyarrow.compress(half, "zstd", asbytes=True) for half in halves))
    return packed


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"])
def test_every_form_plain_and_compressed(tmp_path: Path, kind: str) -> None:
    plain = write(tmp_path / f"a{kind}")
    upper = plain.with_name(f"B{kind.upper()}")
    upper.write_bytes(plain.read_bytes())
    for path in (plain, upper, compress(plain, ".gz"), compress(plain, ".zst"), compress(plain, ".GZ")):
        assert [row.fields["text"] for row in read_rows(path)] == ["one\ntwo", 'a "quoted", word é']
        assert count_rows(path) == 2


def test_arrow_in_the_form_with_an_index(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [dict(row.fields) for row in read_rows(tmp_path / "a.arrow")] == ROWS


def test_what_arrow_fills_up_with_null_was_never_there(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "calls": [{"x": 1}, {"y": 2}]},
    ]
    [row] = read_rows(write(tmp_path / "a.parquet", [{"messages": messages, "text": None}]))
    calls = [{"x": 1}, {"y": 2}]
    assert row.fields == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "calls": calls}],
        "text": None,
    }


def test_a_json_file_may_hold_lines_or_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "READ_AHEAD", 3)
    rows = [{"text": "a]b,{"}, {"n": [1, {"x": 2}]}, {"text": ""}]
    for text in (
        "\n".join(map(json.dumps, rows)),
        json.dumps(rows),
        "\n " + json.dumps(rows, indent=3) + " \n",
    ):
        (tmp_path / "a.json").write_text(text)
        assert [dict(row.fields) for row in read_rows(tmp_path / "a.json")] == rows
    (tmp_path / "a.json").write_text("[ ]")
    assert list(read_rows(tmp_path / "a.json")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "one"}, {"text": ]', r"a\.json: item 2: not JSON"),
        ("a.json", b'[{"text": "one"}, 7]', r"a\.json: item 2: a JSON object is needed, here is int"),
        (
            "a.json",
            b'[{"text": "one"} {"text": "two"}]',
            r"a\.json: item 2: not JSON \(the array does not go on",
        ),
        ("a.json", b'[{"text": "one"}', r"a\.json: item 2: not JSON \(the array does not go on, nor end"),
        ("a.json", b'[{"text": "one"}] 1', r"a\.json: not JSON \(there is more behind the array"),
        ("a.json", b'{\n"text": "one"}', r"a\.json:1: not JSON"),
        ("a.csv", b"text,n\none,1\ntwo\n", r"a\.csv:3: 1 fields, and the first line names 2 columns"),
        ("a.csv", b'text\n"one" two\n', r"a\.csv:2: not readable as a table"),
        ("a.csv", b'text\n"one\n', r"a\.csv:2: not readable as a table"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: not readable as gzip"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: not readable as zstd"),
        ("a.parquet.gz", b"no gzip", r"a\.parquet\.gz: not readable as (gzip|Parquet)"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "one"}\n' * 9, mtime=0)[:-9],
            r"a\.jsonl\.gz: not readable as gzip",
        ),
        ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}\n', mtime=0), r"a\.jsonl\.gz: not UTF-8"),
        ("a.arrow", b"no arrow at all", r"a\.arrow: not readable as Arrow"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_rows(tmp_path / name))


def test_an_empty_field_of_csv_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,\n\n2,two\n")
    assert [row.fields["text"] for row in read_rows(tmp_path / "a.csv")] == [None, "two"]


def test_a_long_field_of_csv_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "a" * 1_000_000)
    assert [len(row.fields["text"]) for row in read_rows(tmp_path / "a.csv")] == [1_000_000]
