"""Calibration text in whatever form a person has it, as a stream of documents."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stages.calibrate.text.files import FORMS, DataUnreachable, find_files, is_table
from stages.calibrate.text.left_out import LeftOut
from stages.calibrate.text.messages import Message, read_messages
from stages.calibrate.text.opening import open_text
from stages.calibrate.text.splits import Split, read_split
from stages.calibrate.text.tables import Row, arrow_row, count_rows, read_lines, read_rows, refuse_long
from state.errors import InputError
from state.reasons import reason

CHAT_COLUMNS = ("messages", "conversations")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
PIECE = 1 << 20  # characters of a plain text file read at a time

Render = Callable[[list[Message], list[Any] | None], str]


@dataclass(frozen=True)
class Piece:
    """A stretch of text. `begins` is true for the first piece of a document; a long file comes in several."""

    text: str
    begins: bool = True


def read_documents(
    data: str, *, split: str, column: str | None, render: Render, left_out: LeftOut
) -> Iterator[Piece]:
    """All documents of `data`, in file order, folders and globs sorted by path.

    Args:
        data: a path, a folder, a glob, or a data set as `NAME` or `NAME:CONFIG`.
        split: which split, and which of its rows: `train`, `train[:1000]`, `train[10%:20%]`.
        column: the column that holds text or chat messages; None finds it.
        render: turns chat messages and the tools they may call into one text.
        left_out: told what is passed over.

    Raises:
        InputError: nothing readable is there, a line is no JSON, a column or split is missing, text is not
            UTF-8.
    """
    wanted = read_split(split)
    files = find_files(data, wanted.name, left_out)
    if files is None:
        yield from _documents(_dataset_rows(data, wanted), column, render, left_out)
    elif is_table(files[0]):
        yield from _documents(_file_rows(files, wanted), column, render, left_out)
    elif wanted.whole:
        for file in files:
            yield from _text_pieces(file)
    else:
        raise InputError(f"--split {split}: {data} is prose, which has no rows. Leave the brackets out.")


def _file_rows(files: list[Path], wanted: Split) -> Iterator[Row]:
    start, stop = wanted.bounds(sum(map(count_rows, files)) if wanted.counts else 0)
    return islice(chain.from_iterable(map(read_rows, files)), start, stop)


def _dataset_rows(data: str, wanted: Split) -> Iterator[Row]:
    import datasets

    name, _, config = data.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
        if wanted.name not in splits:
            there = ", ".join(map(str, splits))
            raise InputError(f"DATA {data} holds no split {wanted.name}, but {there}. Choose with --split.")
        rows = splits[wanted.name].decode(False)  # images and sounds stay what they are: they are left out
        start, stop = wanted.bounds(_rows_known(data, wanted, rows) if wanted.counts else 0)
        for number, fields in enumerate(islice(rows, start, stop), start=start + 1):
            yield arrow_row(data, f"{data}[{wanted.name}]: row {number}", fields)
    except InputError:
        raise
    except Exception as error:  # datasets raises errors of its own, the hub's, fsspec's and the network's
        raise DataUnreachable(
            f"DATA {data}: no such file here, and loading a data set of this name (split {wanted.name}) "
            f"failed: {reason(error)} DATA is {FORMS}."
        ) from error


def _rows_known(data: str, wanted: Split, rows: Any) -> int:
    if known := (rows.info.splits or {}).get(wanted.name):
        return int(known.num_examples)
    raise InputError(
        f"DATA {data} does not say how many rows it has. Give rows by number: --split {wanted.name}[:1000]"
    )


def _text_pieces(file: Path) -> Iterator[Piece]:
    begins, piece, size = True, list[str](), 0
    with open_text(file) as handle:
        for line in read_lines(file, handle):
            piece.append(line)
            size += len(line)
            if size > PIECE:
                yield Piece("".join(piece), begins)
                begins, piece, size = False, [], 0
    if piece:
        yield Piece("".join(piece), begins)


def _documents(rows: Iterator[Row], column: str | None, render: Render, left_out: LeftOut) -> Iterator[Piece]:
    given, table = column, ""
    for row in rows:
        left_out.rows += 1
        if row.table != table:
            column, table = given, row.table
        # The first row that tells decides, so that a table is read one way from beginning to end.
        column = column or _find_column(row)
        if column is not None and column not in row.fields:
            raise InputError(f"{row.where}: no column {column!r}, but {_names(row)}. Choose with --column.")
        value = None if column is None else row.fields[column]
        if value is None or value == []:
            left_out.nulls += 1
        elif isinstance(value, str):
            yield _document(row, value)
        elif isinstance(value, list):
            left_out.columns.update(name for name in MEDIA_COLUMNS if row.fields.get(name))
            yield _document(row, _rendered(row, value, render, left_out))
        else:
            kind = type(value).__name__
            raise InputError(f"{row.where}: column {column!r} holds {kind}, not text or messages.")


def _document(row: Row, text: str) -> Piece:
    refuse_long(row.where, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{row.where}: {text[error.start]!r} at character {error.start} is half of a character "
            f"(a lone surrogate), which no tokenizer takes. Take it out of the text."
        ) from error
    return Piece(text)


def _rendered(row: Row, value: list[Any], render: Render, left_out: LeftOut) -> str:
    try:
        return render(read_messages(value, left_out.parts), _tools(row.fields.get("tools")))
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error


def _tools(value: Any) -> list[Any] | None:
    """The tools that a conversation may call, which tables also keep as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the column 'tools' is not JSON ({reason(error)})") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise InputError(f"the column 'tools' holds {type(value).__name__}, not a list of tools")
    return value


def _find_column(row: Row) -> str | None:
    """The column of a row that is the text; None where this row has null for all that may be it.

    Raises InputError where several may be.
    """
    for name in ("text", *CHAT_COLUMNS):
        if name in row.fields:
            return name
    strings = [name for name, value in row.fields.items() if isinstance(value, str)]
    if not strings and None in row.fields.values():
        return None
    if len(strings) != 1:
        raise InputError(f"{row.where}: which column is the text: {_names(row)}? Choose with --column.")
    return strings[0]


def _names(row: Row) -> str:
    return ", ".join(map(repr, row.fields)) or "none"
