"""Records read back to the same, and every other byte in them is found out and named."""

import errno
import os
from pathlib import Path

import pytest

from stages.export.records import (
    IDENTITY as IDENTITY_FILE,
)
from stages.export.records import (
    JOURNAL,
    MARK,
    Mark,
    Written,
    decode_identity,
    decode_journal,
    decode_mark,
    encode_identity,
    encode_journal,
    encode_mark,
    is_plain,
    read_record,
    shown,
    written,
)
from stages.export.standing import Wanted, examine
from state.durable import Disk
from state.errors import DamagedStore, HoldfastError, IdentityMismatch, InputError
from tests.stages.export.kill_driver import FILES, IDENTITY, SHARDS, make, tree

ENTRY = written("b/c.txt", b"hello")
LINE = b'{"file": "b/c.txt", "bytes": 5, "digest": "xxh3:b5e9c1ad071b3e7fc779cfaa5e523818"}\n'


def test_a_journal() -> None:
    assert encode_journal({"b/c.txt": ENTRY}) == LINE
    assert decode_journal(LINE) == {"b/c.txt": ENTRY}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        LINE[:-1],
        LINE + LINE,
        LINE + b"\n",
        LINE.replace(b"5", b"true", 1),
        LINE.replace(b"5", b"-5", 1),
        LINE.replace(b'"bytes": 5', b'"bytes": 5.0'),
        LINE.replace(b"xxh3", b"md5"),
        LINE.replace(b', "digest"', b', "x": 1, "digest"'),
        b"[]\n",
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_journal_that_is_none(data: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        decode_journal(data)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"1", b'{"a": 1}', b'{"a": "b"}', b"\xff", b"{}"])
def test_an_identity_that_is_none(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_identity(data)


@pytest.mark.parametrize("mark", [Mark("x"), Mark("x", ()), Mark("x", (ENTRY,)), Mark("caf\udce9", (ENTRY,))])
def test_a_mark_and_every_bit_of_it(mark: Mark) -> None:
    data = encode_mark(mark)
    assert decode_mark(data) == mark
    for bit in range(8 * len(data)):
        with pytest.raises((ValueError, RecursionError)):
            decode_mark(flipped(data, bit))
    for length in range(len(data)):
        with pytest.raises(ValueError):
            decode_mark(data[:length])


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damages(data: bytes) -> list[bytes]:
    """Every bit flipped, and every length that is too short."""
    return [flipped(data, bit) for bit in range(8 * len(data))] + [data[:end] for end in range(len(data))]


@pytest.mark.parametrize("name", [IDENTITY_FILE, JOURNAL])
def test_every_damage_to_a_record_of_a_finished_export_is_found_out(tmp_path: Path, name: str) -> None:
    """All of it goes through the reader that the command uses."""
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    for damaged in damages((out / name).read_bytes()):
        (out / name).write_bytes(damaged)
        with pytest.raises(DamagedStore):
            examine(Disk(), out, Wanted(IDENTITY, FILES), overwrite=False)


@pytest.mark.parametrize("name", [IDENTITY_FILE, JOURNAL, MARK])
def test_every_damage_to_a_record_of_an_unfinished_export_is_named_or_mended(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    make(out, IDENTITY, Disk(), shards=1)
    whole, mended = tree(partial), 0
    for damaged in damages(whole[name]):
        (partial / name).write_bytes(damaged)
        try:
            make(out, IDENTITY, Disk(), shards=1)
        except (DamagedStore, InputError):  # InputError: the journal names a shard no more
            assert tree(partial) == whole | {name: damaged}
        else:  # the journal had another digest for a file, which was written again
            assert tree(partial) == whole
            mended += 1
    assert (mended > 0) == (name == JOURNAL)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"weights": "of somebody"}\n'])
def test_a_damaged_identity_is_named_and_mended_when_asked(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    whole = tree(out)
    (out / IDENTITY_FILE).write_bytes(content)
    (out / "README.md").write_text("dear")
    with pytest.raises(DamagedStore, match=rf"{IDENTITY_FILE} is damaged.*--overwrite") as caught:
        make(out, IDENTITY, Disk())
    assert caught.value.exit_code == 4
    make(out, IDENTITY, Disk(), overwrite=True)
    assert tree(out) == whole | {"README.md": b"dear"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, b"", b"{}\n"])
def test_without_a_journal_nothing_is_known_to_be_ours(
    tmp_path: Path, content: bytes | None, overwrite: bool
) -> None:
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    if content is None:
        (out / JOURNAL).unlink()
    else:
        (out / JOURNAL).write_bytes(content)
    before = tree(out)
    with pytest.raises(DamagedStore, match=rf"{JOURNAL} is .*nothing tells which files.*move .* away"):
        make(out, IDENTITY, Disk(), overwrite)
    assert tree(out) == before


@pytest.mark.parametrize("lost", [SHARDS[1], "templates/chat/a.jinja"])
def test_a_journal_that_lost_a_line_is_not_whole(tmp_path: Path, lost: str) -> None:
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    journal = decode_journal((out / JOURNAL).read_bytes())
    (out / JOURNAL).write_bytes(encode_journal({name: journal[name] for name in journal if name != lost}))
    with pytest.raises(DamagedStore, match=f"{JOURNAL} is missing or damaged"):
        make(out, IDENTITY, Disk())


def test_an_identity_of_the_version_before_is_compared_by_field(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, IDENTITY, Disk())
    journal = decode_journal((out / JOURNAL).read_bytes())
    del journal[IDENTITY_FILE]
    (out / JOURNAL).write_bytes(encode_journal(journal))
    (out / IDENTITY_FILE).write_bytes(encode_identity(IDENTITY | {"recipe": "xxh3:3"}))
    with pytest.raises(IdentityMismatch, match="recipe: stored xxh3:3, now xxh3:2"):
        make(out, IDENTITY, Disk())


class Unreadable(Disk):
    def read(self, path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_unreadable_now_is_not_damaged(tmp_path: Path) -> None:
    (tmp_path / MARK).write_bytes(encode_mark(Mark("x")))
    with pytest.raises(InputError, match=rf"{MARK} can't be read now: .*same command again") as caught:
        read_record(Unreadable(), tmp_path / MARK, decode_mark, "")
    assert not isinstance(caught.value, DamagedStore) and isinstance(caught.value, HoldfastError)
    assert read_record(Disk(), tmp_path / "absent", decode_mark, "") is None


@pytest.mark.parametrize("name", ["a", "a b/c.jinja", "...", "a/..b", "é", "x" * 255])
def test_plain_names(name: str) -> None:
    assert is_plain(name)
    assert decode_journal(encode_journal({name: Written(name, 1, ENTRY.digest)})).keys() == {name}


def test_many_names_are_shortened() -> None:
    assert shown("gfedcba") == "a, b, c, d, e and 2 more" and shown(["b", "a"]) == "a, b"
