"""More windows out of little text, for a solver that fits weights to it: the model itself says what it makes
of any of them. Statistics never see these.
"""

import numpy as np
from numpy.typing import NDArray

ENOUGH = 1 << 17
"""Tokens from which on a text is left as it is."""
REPLACED = 0.1
SEED = 0
FIXED: dict[str, float] = {"enough_tokens": ENOUGH, "replaced": REPLACED, "windows_seed": SEED}
"""What the windows depend on besides the text."""


def more_windows(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The same text in windows that begin half a window later, and the windows with a tenth of their tokens
    drawn from the text at random: int32 [up to 2 * windows - 1, seq]; none where there is enough text.

    Args:
        tokens: int32 [windows, seq]. What all of them begin with stays at the beginning.
    """
    windows = len(tokens)
    if tokens.size > ENOUGH:
        return tokens[:0]
    differing = (tokens != tokens[0]).any(axis=0)
    begin = int(differing.argmax()) if differing.any() else 0
    prefix, body = tokens[:, :begin], tokens[:, begin:]
    half = body.shape[1] // 2
    shifted = body.reshape(-1)[half : half + (windows - 1) * body.shape[1]].reshape(
        windows - 1, body.shape[1]
    )
    # RandomState gives the same numbers in every release of numpy.
    random = np.random.RandomState(SEED)
    drawn = body.reshape(-1)[random.randint(body.size, size=body.shape)]
    replaced = np.where(random.random_sample(body.shape) < REPLACED, drawn, body)
    return np.concatenate(
        [np.concatenate([prefix[: len(part)], part], axis=1) for part in (shifted, replaced)]
    )
