"""A file that changes while it is mapped is noticed, whichever way it changes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from state.errors import IdentityMismatch, InputError
from state.mapped import MappedFile


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def write_and_set_times_back(path: Path) -> None:
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another_in_its_place(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


CHANGES: tuple[Callable[[Path], None], ...] = (
    write_in_place,
    write_and_set_times_back,
    put_another_in_its_place,
    append,
    Path.unlink,
)


@pytest.fixture
def mapped(tmp_path: Path) -> MappedFile:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    time.sleep(0.02)  # file systems tell times by the tick
    return MappedFile.open(path)


def test_a_file_that_stays(mapped: MappedFile) -> None:
    mapped.path.read_bytes()
    mapped.require_unchanged()
    assert bytes(mapped.data) == b"abcd" and mapped.data.readonly


def test_what_is_written_to_private_memory_stays_there(mapped: MappedFile) -> None:
    mapped.private[0] = 0
    assert bytes(mapped.data) == mapped.path.read_bytes() == b"abcd"
    mapped.require_unchanged()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes(mapped: MappedFile, change: Callable[[Path], None]) -> None:
    change(mapped.path)
    with pytest.raises(IdentityMismatch) as refused:
        mapped.require_unchanged()
    assert refused.value.exit_code == 3
    assert str(refused.value).startswith(f"{mapped.path} has changed while it was worked from:\n")
    (difference,) = refused.value.differences
    assert difference.field == str(mapped.path)


def test_another_file_is_not_taken_for_the_one_that_was_opened(mapped: MappedFile) -> None:
    put_another_in_its_place(mapped.path)
    with pytest.raises(IdentityMismatch):
        _ = mapped.private


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (None, "No such file")])
def test_a_file_that_cannot_be_mapped(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        MappedFile.open(path)
