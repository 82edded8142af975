"""Windows beyond the text's own, for solvers."""

import numpy as np

from stages.solve import more_windows as module
from stages.solve.more_windows import more_windows


def windows(count: int, seq: int, prefix: int = 0) -> np.ndarray:
    tokens = np.arange(count * seq, dtype=np.int32).reshape(count, seq) + 1000
    tokens[:, :prefix] = 7
    return tokens


def test_the_text_begins_half_a_window_later() -> None:
    found = more_windows(windows(3, 4))
    assert found.dtype == np.int32 and found.shape == (5, 4)
    assert found[:2].tolist() == [[1002, 1003, 1004, 1005], [1006, 1007, 1008, 1009]]


def test_what_every_window_begins_with_stays_there() -> None:
    found = more_windows(windows(2, 5, prefix=1))
    assert found[0].tolist() == [7, 1003, 1004, 1006, 1007]
    assert found[:, 0].tolist() == [7, 7, 7]


def test_a_tenth_of_the_tokens_is_drawn_from_the_text() -> None:
    tokens = windows(64, 256, prefix=2)
    found = more_windows(tokens)[63:]
    other = found != tokens
    assert found.shape == tokens.shape and not other[:, :2].any()
    assert 0.08 < other[:, 2:].mean() < 0.12
    assert np.isin(found[:, 2:], tokens[:, 2:]).all()


def test_the_same_every_time() -> None:
    assert (more_windows(windows(8, 16)) == more_windows(windows(8, 16))).all()


def test_one_window_gives_one_more() -> None:
    assert more_windows(windows(1, 8)).shape == (1, 8)


def test_windows_that_are_all_alike() -> None:
    tokens = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    assert more_windows(tokens)[:2].tolist() == [[2, 3, 0, 1], [2, 3, 0, 1]]


def test_enough_text_is_left_as_it_is() -> None:
    enough = module.ENOUGH // 256
    assert more_windows(windows(enough + 1, 256)).shape == (0, 256)
    assert len(more_windows(windows(enough, 256))) == 2 * enough - 1
