"""Rows of tables in every form they are kept in, read piece by piece."""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from stages.calibrate.text.opening import kind_of, open_seekable, open_text
from state.errors import InputError
from state.reasons import reason

LONGEST = 8 << 20  # characters of a line, document or conversation; tokenizers take texts as a whole
READ_AT_ONCE = 256  # rows of a binary table
READ_AHEAD = 1 << 14  # characters of a JSON array
ARROW_FILE = b"ARROW1\0\0"


@dataclass(frozen=True)
class Row:
    """A record of a table and where it stands ("chat.jsonl:17"), for the message when it is unusable."""

    table: str
    where: str
    fields: Mapping[str, Any]


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a table. Raises InputError naming the first that is malformed."""
    return READERS[kind_of(file)](file)


def count_rows(file: Path) -> int:
    """How many rows `read_rows` gives."""
    if kind_of(file) != ".parquet":
        return sum(1 for _ in read_rows(file))
    import pyarrow.parquet

    with _readable(file, "Parquet"), open_seekable(file) as handle:
        return int(pyarrow.parquet.ParquetFile(handle).metadata.num_rows)


def read_lines(file: Path, handle: TextIO) -> Iterator[str]:
    """The lines of a file. Raises InputError for one that is too long, having read no more."""
    number = 0
    while line := handle.readline(LONGEST + 1):
        number += 1
        refuse_long(f"{file}:{number}", line)
        yield line


def refuse_long(where: str, text: str) -> None:
    """Raise InputError for a text that is longer than tokenizers should be given."""
    if len(text) > LONGEST:
        raise InputError(
            f"{where}: a text of more than {LONGEST:,} characters in one piece. Split it into several."
        )


def arrow_row(table: str, where: str, fields: Mapping[str, Any]) -> Row:
    """A row of Arrow, where all records within a column have all fields that any of them has: those that are
    null within a value, such as the tool calls of a message without any, were never there.
    """
    return Row(table, where, {name: _without_nulls(value) for name, value in fields.items()})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_lines(file: Path) -> Iterator[Row]:
    with open_text(file) as handle:
        for number, line in enumerate(read_lines(file, handle), start=1):
            if line.strip():
                where = f"{file}:{number}"
                yield _row(file, where, _decoded(where, line))


def _json(file: Path) -> Iterator[Row]:
    """An array of objects, or an object a line, whichever it is."""
    with open_text(file) as handle:
        is_array = _at_next(handle, "").startswith("[")
    yield from (_json_array if is_array else _json_lines)(file)


def _json_array(file: Path) -> Iterator[Row]:
    """The objects of an array one by one, with little more than one of them in memory."""
    with open_text(file) as handle:
        ahead = _at_next(handle, "")[1:]
        for number in itertools.count(1):
            where = f"{file}: item {number}"
            ahead = _at_next(handle, ahead)
            if ahead.startswith("]"):
                if _at_next(handle, ahead[1:]):
                    raise InputError(f"{file}: not JSON (there is more behind the array).")
                return
            if number > 1:
                if not ahead.startswith(","):
                    raise InputError(f"{where}: not JSON (the array does not go on, nor end, before it).")
                ahead = _at_next(handle, ahead[1:])
            value, ahead = _next_value(handle, ahead, where)
            yield _row(file, where, value)


def _at_next(handle: TextIO, ahead: str) -> str:
    """What is ahead from the next character that is no space; empty at the end of the file."""
    while not (ahead := ahead.lstrip()) and (read := handle.read(READ_AHEAD)):
        ahead = read
    return ahead


def _next_value(handle: TextIO, ahead: str, where: str) -> tuple[Any, str]:
    """The value that begins `ahead`, reading on until all of it is there, and what is ahead behind it."""
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(ahead)
            return value, ahead[end:]
        except (ValueError, RecursionError) as error:
            # It may go on behind what was read, twice as much of which is tried each time.
            read = handle.read(max(READ_AHEAD, len(ahead))) if len(ahead) <= LONGEST else ""
            if not read:
                raise _not_json(where, error) from error
            ahead += read


def _decoded(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error


def _not_json(where: str, error: Exception) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        return InputError(f"{where}: not JSON ({error.msg}, column {error.colno}).")
    return InputError(f"{where}: not JSON ({error}).")  # a number of 5,000 digits, a list within 5,000 lists


def _row(file: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed, here is {type(value).__name__}.")
    return Row(str(file), where, value)


def _separated(file: Path, delimiter: str) -> Iterator[Row]:
    """Rows of CSV or TSV, whose first line names the columns. An empty field is null: there is no other."""
    csv.field_size_limit(LONGEST)  # of the whole process; its 128 KB are less than a long document has
    with open_text(file) as handle:
        reader = csv.reader(read_lines(file, handle), delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            for values in reader:
                if not values:
                    continue
                where = f"{file}:{reader.line_num}"
                if len(values) != len(names):
                    raise InputError(
                        f"{where}: {len(values)} fields, and the first line names {len(names)} columns. "
                        "Is a quotation mark or a separator missing?"
                    )
                fields = {name: value or None for name, value in zip(names, values, strict=True)}
                yield Row(str(file), where, fields)
        except csv.Error as error:
            raise InputError(f"{file}:{reader.line_num}: not readable as a table ({error}).") from error


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with _readable(file, "Parquet"), open_seekable(file) as handle:
        batches = pyarrow.parquet.ParquetFile(handle).iter_batches(batch_size=READ_AT_ONCE)
        yield from _arrow_rows(file, batches)


def _arrow(file: Path) -> Iterator[Row]:
    """Rows of an Arrow file, which is a stream between a mark and an index, or of a bare stream."""
    import pyarrow.ipc

    with _readable(file, "Arrow"), open_seekable(file) as handle:
        if handle.read(len(ARROW_FILE)) != ARROW_FILE:
            handle.seek(0)
        yield from _arrow_rows(file, pyarrow.ipc.open_stream(handle))


def _arrow_rows(file: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, READ_AT_ONCE):
            for fields in batch.slice(start, READ_AT_ONCE).to_pylist():
                number += 1
                yield arrow_row(str(file), f"{file}: row {number}", fields)


@contextmanager
def _readable(file: Path, form: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow raises errors of its own, OSError, and those of decoding a value
        raise InputError(f"{file}: not readable as {form} ({reason(error)})") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
