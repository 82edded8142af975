"""What a recipe asks for and no checkpoint of this model can hold: refused before anything is measured."""

from collections.abc import Mapping

from stages.model.matrices import StoredMatrix
from stages.recipe.quantizer_plan import QuantizerPlan
from state.errors import InputError
from state.source import TensorEntry

FLOAT_DTYPES = ("BF16", "F16", "F32")


def require_exportable(
    quantizers: QuantizerPlan, matrices: Mapping[str, StoredMatrix], tensors: Mapping[str, TensorEntry]
) -> None:
    """Raise InputError naming the module whose weight the checkpoint does not hold, or which is no matrix of
    floats, or of a shape that its format can't take.
    """
    missing = sorted(
        matrices[module].tensor for module in quantizers.weights if matrices[module].tensor not in tensors
    )
    if missing:
        raise InputError(
            f"recipe {quantizers.recipe.name!r} quantizes {missing[0]}, which the source checkpoint does not "
            f"hold under this name ({len(missing)} such); tied weights are not supported yet: choose a "
            "recipe that leaves them unquantized"
        )
    for module, weight in quantizers.weights.items():
        matrix = matrices[module]
        entry, axes = tensors[matrix.tensor], 2 if matrix.expert is None else 3
        if entry.dtype not in FLOAT_DTYPES or len(entry.shape) != axes:
            raise InputError(
                f"{entry.name} is {entry.dtype}{list(entry.shape)}; only matrices in "
                f"{', '.join(FLOAT_DTYPES)} can be quantized"
            )
        weight.refuse(f"{module}.weight", matrix.shape(tensors))
