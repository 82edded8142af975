"""Whether statistics hold the tokens that went through the model, before they are committed."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from state.errors import DamagedStore
from state.layout import Layout


def require_tokens(
    layout: Layout, arrays: Mapping[str, np.ndarray], expected: int, before: int | None
) -> None:
    """Raise DamagedStore naming the first decoder layer none of whose linears saw exactly the tokens that it
    was given.

    A single linear may see fewer, as those of experts do, or each token several times. But every layer reads
    its hidden states, each token once, by one linear at least.

    Args:
        arrays: a snapshot of all statistics.
        expected: tokens that went through each layer so far.
        before: look at the layers before this one alone; None: at all, and at what is outside the layers.
    """
    seen: dict[int | None, dict[str, int]] = defaultdict(dict)
    for array in layout.arrays:
        if array.role != "input" or array.experts is not None:
            continue
        counts = arrays[f"tokens/{array.key}"].reshape(-1).tolist()
        for layer, site, count in zip(array.layers or (None,), array.sites(), counts, strict=True):
            if count > 0 and (before is None or (layer is not None and layer < before)):
                seen[layer][site.module] = count
    for layer, counts_of in seen.items():
        if expected not in counts_of.values():
            module, count = next(iter(counts_of.items()))
            where = "outside the layers" if layer is None else f"in layer {layer}"
            raise DamagedStore(
                f"the statistics {where} hold {count:,} tokens (of {module}), but {expected:,} went through "
                "the model. They are not committed, and what was committed before is in doubt: calibrate "
                "into another RUN"
            )
