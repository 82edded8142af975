"""The hub's linears that a model class merges into one of its own, such as gate and up of an MLP."""

from collections.abc import Collection, Sequence

from stages.model.modules import LinearModule
from state.errors import InputError
from state.source import TensorEntry

BELOW = {"Concatenate"}
"""What transformers does to the hub's tensors where each becomes a range of rows."""


def linears_of(
    linear: LinearModule, sources: Sequence[TensorEntry], operations: Collection[str]
) -> list[LinearModule]:
    """The hub's linears of which one of the class is made: itself, or each as a range of its rows.

    Args:
        linear: as the class has it, whole. sources: the hub tensors that feed its weight, in order.
        operations: names of what transformers does to them on loading.
    Raises InputError where the rows do not follow from these.
    """
    if len(sources) < 2:
        return [linear]
    rows = sum(entry.shape[0] for entry in sources)
    widths = {entry.shape[1:] for entry in sources}
    if set(operations) != BELOW or widths != {(linear.in_features,)} or rows != linear.out_features:
        raise InputError(
            f"{', '.join(entry.name for entry in sources)}: transformers makes {linear.memory} of these "
            "otherwise than one below the other, which is not supported yet"
        )
    found, first = [], 0
    for entry in sources:
        hub = entry.name.removesuffix(".weight")
        count = entry.shape[0]
        found.append(LinearModule(hub, linear.memory, linear.in_features, count, first, merged=True))
        first += count
    return found
