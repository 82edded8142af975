"""Work that flows: in order, bounded, and left at once."""

import threading
import time
from collections.abc import Iterator

import pytest

from stages.export.flow import in_order


def flowing(asked: Iterator[int], limit: int = 100, workers: int = 3, do=lambda number: number * 2):
    return in_order(asked, do, lambda _: 10, limit, workers, lambda: None)


def test_results_come_in_order() -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * 2

    assert list(flowing(iter(range(50)), do=slow)) == [(number, number * 2) for number in range(50)]


def test_no_more_is_asked_for_than_there_is_room() -> None:
    begun: list[int] = []

    def asked() -> Iterator[int]:
        for number in range(100):
            begun.append(number)
            yield number

    results = flowing(asked(), limit=40)
    next(results)
    time.sleep(0.05)
    assert len(begun) == 5  # four fill the room, one waits before it
    results.close()
    assert len(begun) <= 6


def test_what_is_larger_than_the_room_goes_alone() -> None:
    assert len(list(flowing(iter(range(5)), limit=1))) == 5


@pytest.mark.parametrize("where", ["asking", "doing"])
def test_an_error_is_raised_here_behind_what_came_before(where: str) -> None:
    def asked() -> Iterator[int]:
        yield from range(3)
        if where == "asking":
            raise KeyError("no more")
        yield 3

    def do(number: int) -> int:
        if where == "doing" and number == 3:
            raise KeyError("no more")
        return number

    results, seen = flowing(asked(), do=do), []
    with pytest.raises(KeyError, match="no more"):
        seen.extend(iter(results))
    before = threading.active_count()
    results.close()
    assert threading.active_count() <= before


def test_leaving_ends_the_threads() -> None:
    before = threading.active_count()
    results = flowing(iter(range(10**9)))
    next(results)
    results.close()
    assert threading.active_count() == before
