"""Scales that an export moved from a norm into the weights behind it: what the norm was divided by, they were
multiplied with. Pure.
"""

from collections.abc import Mapping, Sequence
from math import inf

from torch import Tensor

from stages.verify.likeness import Likeness

LARGEST = 1e4
"""Of a scale that was moved on purpose."""
CHANGED = 16
"""One value of so many, at least, changes where all are divided: scales near 1 round away in 16 bits."""
NEARLY_BEST = 1.04
"""The largest error beside the scaled source, relative to that beside the best scales there are, which the
rounding of a column's few values moves a little.
"""


def moved_scales(before: Tensor, after: Tensor) -> list[Tensor]:
    """What a norm `[K]` may have been divided by, f64 `[K]`: as it multiplies, or as 1 + it does; none where
    it was not divided as a whole.
    """
    if before.dim() != 1 or before.shape != after.shape or not before.is_floating_point():
        return []
    was, now = before.double(), after.double()
    found = []
    for offset in (0.0, 1.0):
        scales = (was + offset) / (now + offset)
        usable = scales.isfinite() & (scales > 1 / LARGEST) & (scales < LARGEST)
        if bool(usable.all()) and int((was != now).sum()) >= len(was) / CHANGED:
            found.append(scales)
    return found


Moved = Mapping[str, Sequence[Tensor]]
"""Norm → what it may have been divided by."""


def explained_by(likeness: Likeness, moved: Moved) -> tuple[str, Tensor] | None:
    """The norm, and its scales, that fits best what the columns of a quantized weight were multiplied with;
    None where none fits nearly as well as scales of its own would.
    """
    error, norm, scales = best_of(likeness, moved)
    if scales is None or error > NEARLY_BEST * likeness.column_error:
        return None
    return norm, scales


def best_of(likeness: Likeness, moved: Moved) -> tuple[float, str, Tensor | None]:
    """The least error beside scales, and whose they are."""
    fitting = [
        (likeness.error_beside(scales), norm, scales)
        for norm, found in moved.items()
        for scales in found
        if len(scales) == len(likeness.qq)
    ]
    return min(fitting, key=lambda one: one[:2], default=(inf, "", None))
