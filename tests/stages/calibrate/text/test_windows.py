"""Where windows are taken, and that text is the same again once its stretches are joined."""

import pytest

from stages.calibrate.text.texts import Piece
from stages.calibrate.text.windows import Stretch, evenly, joined, stretches, thinned


def test_windows_lie_as_far_apart_as_can_be() -> None:
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(3, 4) == [0, 1, 2]
    assert evenly(0, 4) == []


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 100])
def test_joined_stretches_are_the_pieces_they_were_cut_from(length: int) -> None:
    pieces = [Piece("one two"), Piece("three", begins=False), Piece(""), Piece("f o u r"), Piece("12345678")]
    parts = list(stretches(iter(pieces), length))
    assert all(sum(len(piece.text) for piece in part.pieces) <= length for part in parts)
    assert [piece for piece in joined(parts) if piece.text] == [piece for piece in pieces if piece.text]


def test_a_stretch_ends_before_a_space_where_there_is_one() -> None:
    parts = list(stretches(iter([Piece("one two three")]), 9))
    assert [part.pieces[0].text for part in parts] == ["one two", " three"]
    assert [part.continues for part in parts] == [False, True]


@pytest.mark.parametrize(
    ("count", "kept"),
    [(0, []), (3, [0, 1, 2]), (8, [*range(8)]), (9, [0, 2, 4, 6, 8]), (17, [0, 4, 8, 12, 16])],
)
def test_stretches_that_are_kept_lie_equally_far_apart(count: int, kept: list[int]) -> None:
    parts = [Stretch(False, [Piece(str(number))]) for number in range(count)]
    taken, all_of_them = thinned(iter(parts), 2)
    assert [int(part.pieces[0].text) for part in taken] == kept
    assert all_of_them == (count <= 8)
