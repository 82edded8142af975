"""Scales: from unified amax values to the float32 numbers a checkpoint stores.

Each formula is modelopt's, in its order of operations, so that the bytes are its own: `NVFP4QTensor` in
modelopt/torch/quantization/qtensor/nvfp4_tensor.py, `get_scaling_factor` and `postprocess_state_dict` in
modelopt/torch/export/quant_utils.py. Every amax is a float32 scalar `[]`; so is every scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.export.unify import Unified, connected, floor_dead, merge
from stages.formats.pack import raw_bytes
from stages.recipe.quantizers import WeightFormat
from stages.settings import DeadPolicy
from state.errors import InputError

E2M1_MAX = 6.0
E4M3_MAX = 448.0
INT8_MAX = 127.0

TENSOR_SCALED = ("nvfp4", "fp8", "w4a8_awq")
"""Formats with one weight scale for the whole tensor, beside or instead of those per block."""

GROUP_SHARED = ("nvfp4", "w4a8_awq")
"""Those of them whose tensor scale is shared over every group that engines run as one matrix."""


def input_scale(weight_format: str, amax: Tensor) -> Tensor:
    """amax / (6 * 448) for NVFP4, amax / 127 for INT8, amax / 448 for FP8 and W4A8 (FP8 activations)."""
    if weight_format == "nvfp4":
        return amax / (E2M1_MAX * E4M3_MAX)
    return amax / (INT8_MAX if weight_format == "int8_sq" else E4M3_MAX)


def weight_scale_2(weight_format: str, amax: Tensor) -> Tensor:
    """The second-level weight scale: amax / (6 * 448) for NVFP4, amax / 448 for W4A8."""
    return amax / (E2M1_MAX * E4M3_MAX) if weight_format == "nvfp4" else amax / E4M3_MAX


def fp8_weight_scale(amax: Tensor) -> Tensor:
    """FP8's per-tensor weight scale: amax / 448."""
    return amax / E4M3_MAX


def kv_scale(amax: Tensor) -> Tensor:
    """The FP8 cache scale of K or V: amax / 448."""
    return amax / E4M3_MAX


def share_weight_amax(
    recorded: Mapping[str, Tensor],
    formats: Mapping[str, WeightFormat],
    same_input: Sequence[Sequence[str]],
    engine_fused: Sequence[Sequence[str]],
    fused_experts: frozenset[str],
    dead: DeadPolicy,
) -> Unified:
    """The weight amax of each module whose format has a scale for the whole tensor; names are hub modules.

    NVFP4 and W4A8 share one over every same-input or engine-fused group, since engines that fuse a group
    don't re-express block scales. FP8 shares one only where the model class stores an expert's projections as
    one parameter, as modelopt does.

    Raises InputError naming the module for a weight amax that is NaN or infinite.
    """
    unusable = [name for name in formats if not bool(recorded[name].isfinite())]
    if unusable:
        raise InputError(
            f"{', '.join(unusable[:5])}: the weight's amax in the run is {recorded[unusable[0]].item()}; "
            "repair the source checkpoint, whose weights must be finite, and calibrate again"
        )
    groups = [
        [name for name in group if name in formats and formats[name].format in GROUP_SHARED]
        for group in (*same_input, *engine_fused)
    ]
    groups += [
        [
            name
            for name in group
            if name in formats and formats[name].format == "fp8" and name in fused_experts
        ]
        for group in engine_fused
    ]
    scaled = [name for name in formats if formats[name].format in TENSOR_SCALED]
    group_of = connected(scaled, groups)
    shared: dict[str, Tensor | None] = {
        f"{name}.weight_quantizer": merge([recorded[member] for member in group_of[name]]) for name in scaled
    }
    floored, uses = floor_dead(shared, dead)
    return Unified(floored, tuple(uses))


def stored(scale: Tensor) -> bytes:
    """Four little-endian bytes. Raises ValueError for a scale that is not finite and positive."""
    value = scale.to(torch.float32).reshape(())
    if not bool(value.isfinite()) or value.item() <= 0:
        raise ValueError(f"scale {value.item()} is not finite and positive")
    return value.numpy().tobytes()


def stored_vector(scale: Tensor) -> memoryview:
    """The bytes of a vector in its own dtype. Raises ValueError unless all of it is finite and positive."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("a scale of the vector is not finite and positive")
    return raw_bytes(scale)
