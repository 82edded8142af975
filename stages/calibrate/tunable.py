"""Whether every layer that is to be tuned fits the device, before anything is computed."""

from collections import defaultdict
from collections.abc import Mapping

import torch

from stages.recipe.solvers import Solver
from state.errors import InputError
from state.names import split_name

TUNED_BYTES = 18
"""Of each tuned parameter: its latent and the mean of its gradient, f32; weight and gradient, bf16, and again
where a class joins matrices in one parameter; its code."""
SOURCE_BYTES = 2
MOMENT_BYTES = 4
SHARE = 0.8
"""Of what is free; the rest is for activations and their gradients."""
INSTEAD = "general/ptq/nvfp4_default-kv_none-gptq"


def largest_layer(matrices: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The decoder layer that takes the most memory to tune, and how many bytes that is: latents, momentum,
    weights and gradients, the source, and Σ xxᵀ of what every module reads.

    Args:
        matrices: quantized module → (rows, columns). Modules outside the layers don't count.
    """
    bytes_of: dict[int, int] = defaultdict(int)
    moments: dict[tuple[int, str, int], int] = {}
    for module, (rows, columns) in matrices.items():
        layer = split_name(module)[1]
        if layer is not None:
            bytes_of[layer] += rows * columns * (TUNED_BYTES + SOURCE_BYTES)
            # What reads one input shares its moment: q/k/v lie in one parent, as gate and up do.
            moments[layer, module.rpartition(".")[0], columns] = columns * columns * MOMENT_BYTES
    for (layer, _, _), size in moments.items():
        bytes_of[layer] += size
    return max(bytes_of.items(), key=lambda item: item[1], default=(0, 0))


def require_room(
    solver: Solver, recipe: str, matrices: Mapping[str, tuple[int, int]], device: torch.device
) -> None:
    """Raise InputError naming the layer that a GPU has no memory to tune."""
    if solver.method != "tune" or device.type != "cuda":
        return
    layer, needed = largest_layer(matrices)
    free = int(torch.cuda.mem_get_info(device)[0] * SHARE)
    if needed > free:
        raise InputError(
            f"recipe {recipe!r} tunes a whole layer at a time: layer {layer} takes {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB of {device} can be used; GPTQ takes less: RECIPE={INSTEAD}"
        )
