"""Calibration text in whatever form a person has it, as a stream of documents."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state.errors import InputError
from state.home import expand_home
from state.naming import naming
from state.reasons import reason

CHAT_COLUMNS = ("messages", "conversations")
TABLES = (".jsonl", ".ndjson", ".parquet")
TEXTS = (".txt", ".md", ".rst")
PIECE = 1 << 20  # characters of a plain text file read at a time
LONGEST = 8 << 20  # characters of a line, document or conversation; tokenizers take texts as a whole
FORMS = "JSONL (.jsonl), Parquet (.parquet), plain text, a folder or glob of these, or the name of a data set"

Render = Callable[[list[dict[str, str]]], str]


class DataUnreachable(InputError):
    """There is no such file, and no such data set can be loaded (now)."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text. `begins` is true for the first piece of a document; a long file comes in several."""

    text: str
    begins: bool = True


@dataclass(frozen=True)
class Row:
    """A record of a table and where it stands ("chat.jsonl:17"), for the message when it is unusable."""

    where: str
    fields: Mapping[str, Any]


def read_documents(data: str, *, split: str, column: str | None, render: Render) -> Iterator[Piece]:
    """All documents of `data`, in file order, folders and globs sorted by path.

    Args:
        data: a path, a folder, a glob, or a data set as `NAME` or `NAME:CONFIG`.
        split: which split of a data set; files have none.
        column: the column that holds text or chat messages; None finds it.
        render: turns chat messages ({"role", "content"}) into one text.

    Raises:
        InputError: nothing readable is there, a line is no JSON, a column is missing, text is not UTF-8.
    """
    files = find_files(data)
    if files is None:
        yield from _documents(_dataset_rows(data, split), column, render)
        return
    for file in files:
        if file.suffix == ".parquet":
            yield from _documents(_parquet_rows(file), column, render)
        elif file.suffix in TABLES:
            yield from _documents(_jsonl_rows(file), column, render)
        else:
            yield from _text_pieces(file)


def find_files(data: str) -> list[Path] | None:
    """The files `data` stands for, or None where it can only be the name of a data set."""
    path = expand_home(data)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in TABLES + TEXTS)
        if not files:
            raise InputError(f"DATA {data}: no {', '.join(TABLES + TEXTS)} file is in this folder.")
        return files
    if any(char in data for char in "*?["):
        anchor = Path(path.anchor)
        files = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file())
        if not files:
            raise DataUnreachable(f"DATA {data}: no file matches.")
        return files
    if data.startswith(("/", ".", "~")) or path.suffix in TABLES + TEXTS or data.count("/") > 1:
        raise DataUnreachable(f"DATA {data}: no such file. DATA is {FORMS}.")
    return None


def is_reachable(data: str) -> bool:
    """Whether `data` can be read here and now; False also for what never was a file or data set."""
    try:
        if find_files(data) is not None:
            return True
        import datasets

        name, _, config = data.partition(":")
        datasets.load_dataset_builder(name, config or None)
    except Exception:  # whatever the reason, the answer is the same
        return False
    return True


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file. Raises InputError for one that is too long or not UTF-8, having read no more."""
    try:
        with naming(file), file.open(encoding="utf-8-sig") as handle:
            number = 0
            while line := handle.readline(LONGEST + 1):
                number += 1
                _refuse_long(f"{file}:{number}", line)
                yield line
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason}). DATA is {FORMS}.") from error


def _refuse_long(where: str, text: str) -> None:
    if len(text) > LONGEST:
        raise InputError(
            f"{where}: a text of more than {LONGEST:,} characters in one piece. Split it into several."
        )


def _jsonl_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from error
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list within 5,000 lists
            raise InputError(f"{where}: not JSON ({error}).") from error
        if not isinstance(fields, dict):
            raise InputError(f"{where}: a JSON object is needed, here is {type(fields).__name__}.")
        yield Row(where, fields)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{file}: row {number}", fields)
    except Exception as error:  # pyarrow raises errors of its own, OSError, and those of decoding a value
        raise InputError(f"{file}: not readable as Parquet ({reason(error)})") from error


def _dataset_rows(data: str, split: str) -> Iterator[Row]:
    import datasets

    name, _, config = data.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield Row(f"{data}[{split}]: row {number}", fields)
    except Exception as error:  # datasets raises errors of its own, the hub's, fsspec's and the network's
        raise DataUnreachable(
            f"DATA {data}: no such file here, and loading a data set of this name (split {split}) failed: "
            f"{reason(error)} DATA is {FORMS}."
        ) from error


def _text_pieces(file: Path) -> Iterator[Piece]:
    begins, piece, size = True, list[str](), 0
    for line in _lines(file):
        piece.append(line)
        size += len(line)
        if size > PIECE:
            yield Piece("".join(piece), begins)
            begins, piece, size = False, [], 0
    if piece:
        yield Piece("".join(piece), begins)


def _documents(rows: Iterator[Row], column: str | None, render: Render) -> Iterator[Piece]:
    for row in rows:
        # The first row decides, so that a table is read one way from beginning to end.
        column = column or _find_column(row)
        if column not in row.fields:
            raise InputError(f"{row.where}: no column {column!r}, but {_names(row)}. Choose with --column.")
        value = row.fields[column]
        if isinstance(value, str):
            yield _document(row, value)
        elif isinstance(value, list):
            yield _document(row, _rendered(row, render, _messages(row, column, value)))
        else:
            kind = type(value).__name__
            raise InputError(f"{row.where}: column {column!r} holds {kind}, not text or messages.")


def _document(row: Row, text: str) -> Piece:
    _refuse_long(row.where, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{row.where}: {text[error.start]!r} at character {error.start} is half of a character "
            f"(a lone surrogate), which no tokenizer takes. Take it out of the text."
        ) from error
    return Piece(text)


def _rendered(row: Row, render: Render, messages: list[dict[str, str]]) -> str:
    try:
        return render(messages)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error


def _find_column(row: Row) -> str:
    for name in ("text", *CHAT_COLUMNS):
        if name in row.fields:
            return name
    strings = [name for name, value in row.fields.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise InputError(f"{row.where}: which column is the text: {_names(row)}? Choose with --column.")
    return strings[0]


def _names(row: Row) -> str:
    return ", ".join(map(repr, row.fields)) or "none"


def _messages(row: Row, column: str, value: list[Any]) -> list[dict[str, str]]:
    """Messages as chat templates expect them; ShareGPT's {"from", "value"} is translated."""
    speakers = {"human": "user", "gpt": "assistant"}
    messages = []
    for message in value:
        if isinstance(message, dict) and "role" in message and "content" in message:
            messages.append({key: field for key, field in message.items() if field is not None})
        elif isinstance(message, dict) and "from" in message and "value" in message:
            role = speakers.get(str(message["from"]), message["from"])
            messages.append({"role": role, "content": message["value"]})
        else:
            raise InputError(
                f"{row.where}: {column!r} holds a message without role and content: {str(message)[:60]}"
            )
    return messages
