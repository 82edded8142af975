"""Scales: from unified amax values to the float32 numbers a checkpoint stores.

Each formula is modelopt's, in its order of operations, so that the bytes are its own: `NVFP4QTensor` in
modelopt/torch/quantization/qtensor/nvfp4_tensor.py, `get_scaling_factor` and `postprocess_state_dict` in
modelopt/torch/export/quant_utils.py. Every amax is a float32 scalar `[]`; so is every scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.export.unify import Unified, connected, floor_dead, merge
from stages.quantizers import WeightFormat
from stages.settings import DeadPolicy
from state.errors import InputError

E2M1_MAX = 6.0
E4M3_MAX = 448.0


def input_scale(weight_format: str, amax: Tensor) -> Tensor:
    """amax / (6 * 448) for NVFP4, amax / 448 for FP8."""
    return amax / (E2M1_MAX * E4M3_MAX) if weight_format == "nvfp4" else amax / E4M3_MAX


def weight_scale_2(amax: Tensor) -> Tensor:
    """NVFP4's second-level weight scale: amax / (6 * 448)."""
    return amax / (E2M1_MAX * E4M3_MAX)


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
    """The weight amax each module is packed with; names are hub modules.

    NVFP4 shares one over every same-input or engine-fused group, since engines that fuse a group don't
    re-express block scales. FP8 shares one only where the model class stores an expert's projections as one
    parameter, as modelopt does.

    Raises InputError naming the module for a weight amax that is NaN or infinite.
    """
    unusable = [name for name in formats if not bool(recorded[name].isfinite())]
    if unusable:
        raise InputError(
            f"{', '.join(unusable[:5])}: the weight's amax in the run is {recorded[unusable[0]].item()}; "
            "repair the source checkpoint, whose weights must be finite, and calibrate again"
        )
    groups = [
        [name for name in group if name in formats and formats[name].format == "nvfp4"]
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
    group_of = connected(formats, groups)
    shared: dict[str, Tensor | None] = {
        f"{name}.weight_quantizer": merge([recorded[member] for member in group_of[name]]) for name in formats
    }
    floored, uses = floor_dead(shared, dead)
    return Unified(floored, tuple(uses))


def stored(scale: Tensor) -> bytes:
    """Four little-endian bytes. Raises ValueError for a scale that is not finite and positive."""
    value = scale.to(torch.float32).reshape(())
    if not bool(value.isfinite()) or value.item() <= 0:
        raise ValueError(f"scale {value.item()} is not finite and positive")
    return value.numpy().tobytes()
