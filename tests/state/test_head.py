from pathlib import Path

import pytest

from state.head import BrokenHead, Cursor, Head, head_numbers, read_pointer
from state.recovery import retained
from tests.state import driver

RUN = Path("runs/a")
DIGEST = "xxh3:" + 32 * "a"


def head(number: int = 12, generation: str | None = "g000012") -> Head:
    environments = (driver.RECORD.environment,)
    return Head.of(
        number, Cursor(pass_number=1, layer=2, batch=3), False, generation, environments, {"b": "2", "a": "1"}
    )


def test_round_trip() -> None:
    assert Head.decode(head().encode(), RUN) == head()
    assert list(head().objects) == ["a", "b"]
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
    assert read_pointer(head().pointer) == (12, head().digest)
    assert read_pointer(f"heads/000007.json {DIGEST}\n".encode()) == (7, DIGEST)


@pytest.mark.parametrize(
    "data",
    [b"", b"heads/000007.json", f"heads/000007.json {DIGEST}".encode(), f"heads/07.json {DIGEST}\n".encode(),
     f"../heads/000007.json {DIGEST}\n".encode(), f"heads/000007.json {DIGEST}\n\n".encode()],
)  # fmt: skip
def test_other_bytes_are_no_pointer(data: bytes) -> None:
    with pytest.raises(BrokenHead):
        read_pointer(data)


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
