"""Files of DATA opened for reading, decompressed on the way where their names end in .gz or .zst."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO, cast

from state.errors import InputError
from state.naming import naming
from state.reasons import reason

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def kind_of(file: PurePath) -> str:
    """The suffix that says what a file holds, in small letters: `.jsonl` of `Chats.JSONL.gz`."""
    suffix = file.suffix.lower()
    return PurePath(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """A text file, without its byte order mark.

    Raises InputError where what is read within is not UTF-8, or is not compressed as the file's name says.
    """
    try:
        with _reading(file):
            if file.suffix.lower() in COMPRESSIONS:
                with file.open("rb") as raw:
                    yield io.TextIOWrapper(cast(Any, _decompressed(file, raw)), encoding="utf-8-sig")
            else:
                with file.open(encoding="utf-8-sig") as handle:
                    yield handle
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason}). Convert it to UTF-8.") from error


@contextmanager
def open_seekable(file: Path) -> Iterator[BinaryIO]:
    """A binary file in which a reader may go back and forth; a compressed one as a temporary file on disk."""
    with _reading(file), file.open("rb") as raw:
        if file.suffix.lower() not in COMPRESSIONS:
            yield raw
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(_decompressed(file, raw), plain)
            plain.seek(0)
            yield cast(BinaryIO, plain)


def _decompressed(file: Path, raw: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(raw, COMPRESSIONS[file.suffix.lower()])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What fails without an error number is not the disk's fault but the content's."""
    try:
        with naming(file):
            yield
    except OSError as error:
        suffix = file.suffix.lower()
        if error.errno is not None or suffix not in COMPRESSIONS:
            raise
        raise InputError(f"{file}: not readable as {COMPRESSIONS[suffix]} ({reason(error)}).") from error
