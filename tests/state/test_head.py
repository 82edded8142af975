from pathlib import Path

import pytest

from state.errors import DamagedStore
from state.head import BrokenHead, Cursor, Head, Pointer, head_numbers, read_pointer
from state.recovery import retained
from tests.state import driver

RUN = Path("runs/a")
DIGEST = "xxh3:" + 32 * "a"


def head(number: int = 12, generation: str | None = "g000012") -> Head:
    environments = (driver.RECORD.environment,)
    return Head.of(
        number,
        Cursor(pass_number=1, layer=2, batch=3),
        False,
        generation,
        environments,
        {"run.json": "2", "calibration.zarr/zarr.json": "1"},
    )


def test_round_trip() -> None:
    assert Head.decode(head().encode(), RUN) == head()
    assert list(head().objects) == ["calibration.zarr/zarr.json", "run.json"]
    assert head().path == "heads/000012.json"
    assert head(1234567).path == "heads/1234567.json"


def test_every_flipped_bit_is_noticed() -> None:
    data = head().encode()
    for position in range(len(data)):
        for bit in range(8):
            flipped = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            with pytest.raises(BrokenHead):
                Head.decode(flipped, RUN)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff", head().encode()[:-1], head().encode() + b" "]
)
def test_other_bytes_are_no_head(data: bytes) -> None:
    with pytest.raises(BrokenHead):
        Head.decode(data, RUN)


def test_pointer() -> None:
    assert read_pointer(head().pointer, RUN) == Pointer(12, head().digest, head())
    assert head().pointer.startswith(f"heads/000012.json {head().digest}\n{{".encode())
    of_the_first_format = f"heads/000007.json {DIGEST}\n".encode()
    assert read_pointer(of_the_first_format, RUN) == Pointer(7, DIGEST)
    assert read_pointer(None, RUN) == Pointer(fault="is missing")


def test_every_flipped_bit_of_a_pointer_is_noticed_and_half_of_it_is_enough() -> None:
    data = head().pointer
    line = data.index(b"\n") + 1
    for position in range(len(data)):
        for bit in range(8):
            flipped = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            found = read_pointer(flipped, RUN)
            assert found.fault == "is damaged"
            if position >= line:
                assert found == Pointer(12, head().digest, fault="is damaged")
            elif position < line - 1:
                assert found.head in (head(), None) and found.digest in (head().digest, None)


@pytest.mark.parametrize(
    "data",
    [b"", b"heads/000007.json", f"heads/000007.json {DIGEST}".encode(), f"heads/07.json {DIGEST}\n".encode(),
     f"../heads/000007.json {DIGEST}\n".encode(), f"heads/000007.json {DIGEST}\n\n".encode()],
)  # fmt: skip
def test_other_bytes_are_no_pointer(data: bytes) -> None:
    found = read_pointer(data, RUN)
    assert (found.head, found.fault) == (None, "is damaged")


@pytest.mark.parametrize(
    "generation",
    [
        "../../victim",
        "/victim",
        "",
        ".",
        "g000012/..",
        "g12",
        "g000012\\x",
        "g000012\0",
        "g000012\n",
        "tokens",
    ],
)
def test_a_generation_of_another_name_is_refused(generation: str) -> None:
    with pytest.raises(DamagedStore, match="which no commit of Holdfast does") as caught:
        Head.decode(head(generation=generation).encode(), RUN)
    assert repr(generation) in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["../victim", "/etc/passwd", "", ".", "NOTES.md", "events.jsonl", "calibration.zarr/../zarr.json",
     "calibration.zarr/g000012/../../x/c.0", "calibration.zarr/g000012//c.0",
     "calibration.zarr/g000012/a\\b/c.0", "calibration.zarr/g000012/a\0/c.0", "calibration.zarr/mine/c.0",
     "calibration.zarr/tokens/photo.jpg"],
)  # fmt: skip
def test_objects_of_other_names_are_refused(path: str) -> None:
    forged = Head.of(12, Cursor(), False, "g000012", (), {path: DIGEST})
    with pytest.raises(DamagedStore, match="which is no file of a run"):
        Head.decode(forged.encode(), RUN)


def test_head_numbers_ignore_other_files() -> None:
    assert head_numbers(["000010.json", "000002.json", "1000000.json", "x.json", "000003.json.tmp"]) == [
        2,
        10,
        1000000,
    ]


def test_retained_are_the_newest_head_and_the_newest_of_the_generation_before() -> None:
    heads = [
        head(5, "g000004"),
        head(4, "g000004"),
        head(3, "g000002"),
        head(2, "g000002"),
        head(1, "g000001"),
    ]
    assert [one.number for one in retained(heads)] == [5, 3]
    assert [one.number for one in retained(heads[:2])] == [5]
    assert [one.number for one in retained([head(1, "g000001"), head(0, None)])] == [1, 0]
