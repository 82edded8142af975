"""Where the projections of each expert lie in hub tensors that hold those of all experts.

What is known: which hub tensors feed a parameter, the shapes of both, and what the module says of its
parameters: gate and up one after the other or in turns, stored as `[in, out]` or `[out, in]`. A family needs
no entry anywhere.
"""

from collections.abc import Collection, Sequence

from stages.model.matrices import StoredMatrix
from stages.model.modules import Arrangement
from state.errors import InputError
from state.source import TensorEntry

TRANSPOSE = "Transpose"


def expert_matrices(
    experts: str,
    leaves: Sequence[str],
    arranged: Arrangement,
    shape: Sequence[int],
    sources: Sequence[TensorEntry],
    operations: Collection[str],
) -> dict[str, StoredMatrix]:
    """Hub name of each expert's projection → where its matrix lies.

    Args:
        experts: hub name of the experts module. leaves: the projections that the parameter holds, in order.
        arranged: how the module holds its experts.
        shape: of the parameter, `[experts, …, …]`.
        sources: the hub tensors that feed it, in order: one with everything, or one for each leaf.
        operations: names of what transformers does to them on loading.
    Raises InputError where the layout does not follow from these.
    """
    if not sources:
        raise InputError(f"the checkpoint has no tensor that feeds {experts}")
    names = ", ".join(entry.name for entry in sources)
    together = len(sources) == 1
    allowed = {TRANSPOSE} if together else {TRANSPOSE, "Concatenate"}
    if others := sorted(set(operations) - allowed):
        raise InputError(
            f"{names}: transformers rearranges these experts by {', '.join(others)} as it loads them, which "
            "is not supported yet; supported: experts one by one, or fused and at most transposed"
        )
    if not together and len(sources) != len(leaves):
        raise InputError(f"{names} are {len(sources)} tensors for the {len(leaves)} projections of {experts}")
    found: dict[str, StoredMatrix] = {}
    parts = len(leaves) if together else 1
    for position, leaf in enumerate(leaves):
        entry = sources[0 if together else position]
        turned = TRANSPOSE in operations
        transposed, rows = _orientation(entry, arranged.transposed, turned, shape, len(leaves) // parts)
        each = rows // parts
        first, stride = (position, parts) if arranged.interleaved else (position * each, 1)
        if parts == 1:
            first, stride = 0, 1
        for number in range(shape[0]):
            found[f"{experts}.{number}.{leaf}"] = StoredMatrix(
                entry.name, number, transposed, first, stride, each if parts > 1 else None
            )
    return found


def _orientation(
    entry: TensorEntry, is_transposed: bool, turned: bool, shape: Sequence[int], split: int
) -> tuple[bool, int]:
    """Whether a hub tensor is stored as `[experts, in, out]`, and how many rows `out` is.

    is_transposed: whether the parameter is. turned: whether loading transposes the tensor whatever its shape.
    split: how many tensors of this size the parameter is made of.
    """
    count, second, third = shape
    second, third = (second, third // split) if is_transposed else (second // split, third)
    if entry.shape == (count, second, third) and not turned:
        transposed = is_transposed
    elif entry.shape == (count, third, second):
        transposed = not is_transposed
    else:
        raise InputError(
            f"{entry.name} has shape {list(entry.shape)}; for a parameter of {list(shape)}, "
            f"{[count, second, third]} or transposed was expected"
        )
    return transposed, entry.shape[2 if transposed else 1]


def fused_hub_name(tensor: str) -> str:
    """Hub name of an experts module from a tensor that feeds it.

    It lies in the module (`….experts.gate_up_proj`), or in a linear that is none beside a router, such as
    `block_sparse_moe.input_linear.weight`: then the experts are called `experts` there.
    """
    parent = tensor.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith("experts") else f"{parent}.experts"
