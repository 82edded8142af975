"""The chain of solutions that see what leaves quantized layers: each is made behind all before it, and says
behind which. One that is made again and comes out otherwise leaves those after it behind nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.identity import described, digest, digest_json

Attributes = Mapping[str, Any]
"""What is kept with a layer's solution."""

OWN, BEHIND = "digest", "behind"


def links(arrays: Mapping[str, NDArray[Any]], before: Mapping[int, Attributes]) -> dict[str, Any]:
    """What is kept with a solution for the chain: the digest of its arrays, and of those it was made behind,
    by layer.

    before: those of all layers before it that have a solution.
    """
    own = digest_json(
        [
            (name, described(str(values.dtype), values.shape, digest(np.ascontiguousarray(values).data)))
            for name, values in sorted(arrays.items())
        ]
    )
    return {OWN: own, BEHIND: {str(layer): found[OWN] for layer, found in sorted(before.items())}}


def outdated(solutions: Mapping[int, Attributes]) -> dict[int, int]:
    """Layer whose solution was made behind another one of an earlier layer than there is → that layer, the
    first such. Of a layer without a solution nothing is known until it is solved; solutions that are made
    behind none are never outdated.
    """
    found: dict[int, int] = {}
    for layer, attributes in sorted(solutions.items()):
        behind = attributes.get(BEHIND, {})
        others = (
            earlier
            for earlier in sorted(solutions)
            if earlier < layer
            and BEHIND in attributes
            and behind.get(str(earlier)) != solutions[earlier][OWN]
        )
        first = next(others, None)
        if first is not None:
            found[layer] = first
    return found


def told(found: Mapping[int, int]) -> str:
    """For the screen: what is outdated, by name."""
    behind = sorted(set(found.values()))
    return (
        f"{_layers(found)} solved behind {'another solution' if len(behind) == 1 else 'other solutions'} of "
        f"layer{'s' * (len(behind) > 1)} {', '.join(map(str, behind))} than there "
        f"{'is' if len(behind) == 1 else 'are'} now"
    )


def _layers(layers: Iterable[int]) -> str:
    listed = sorted(layers)
    names = ", ".join(map(str, listed))
    return f"layer {names} was" if len(listed) == 1 else f"layers {names} were"
