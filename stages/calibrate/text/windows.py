"""Token windows out of a stream of documents: from its beginning, or evenly over the whole of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from stages.calibrate.text.texts import Piece


@dataclass
class Stretch:
    """A part of DATA. continues: whether its first piece was cut off the last one of the stretch before."""

    continues: bool
    pieces: list[Piece] = field(default_factory=list)


def cut(ids: NDArray[np.int32], prefix: NDArray[np.int32], seq: int) -> NDArray[np.int32]:
    """Windows of `seq` tokens that begin with `prefix`, int32 [windows, seq]; the remainder is dropped."""
    body = seq - len(prefix)
    windows = len(ids) // body
    rows = ids[: windows * body].reshape(windows, body)
    return np.concatenate([np.tile(prefix, (windows, 1)), rows], axis=1)


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, as far apart as can be; all of them where there are fewer."""
    return [number * count // wanted for number in range(wanted)] if count > wanted else list(range(count))


def stretches(pieces: Iterator[Piece], length: int) -> Iterator[Stretch]:
    """All of the pieces in stretches of `length` characters or, so as to cut no word, somewhat less."""
    stretch, room = Stretch(continues=False), length
    for piece in pieces:
        rest = piece
        while len(rest.text) > room:
            space = rest.text.rfind(" ", room // 2, room)
            end = space if space > 0 else room
            stretch.pieces.append(replace(rest, text=rest.text[:end]))
            yield stretch
            rest = Piece(rest.text[end:], begins=False)
            stretch, room = Stretch(continues=True), length
        stretch.pieces.append(rest)
        room -= len(rest.text)
        if room == 0:
            yield stretch
            stretch, room = Stretch(continues=False), length
    if stretch.pieces:
        yield stretch


def thinned(parts: Iterator[Stretch], wanted: int) -> tuple[list[Stretch], bool]:
    """Twice to four times as many of the parts as wanted, each as far from the next, and whether these are
    all there are. Reads them once and never holds more.
    """
    kept: list[Stretch] = []
    step = 1
    for number, part in enumerate(parts):
        if number % step:
            continue
        if len(kept) == 4 * wanted:
            kept, step = kept[::2], 2 * step
        kept.append(part)
    return kept, step == 1


def joined(parts: list[Stretch]) -> Iterator[Piece]:
    """The pieces of neighbouring stretches as they were before they were cut."""
    last: Piece | None = None
    for part in parts:
        for number, piece in enumerate(part.pieces):
            if last is not None and part.continues and number == 0:
                last = replace(last, text=last.text + piece.text)
                continue
            if last is not None:
                yield last
            last = piece
    if last is not None:
        yield last
