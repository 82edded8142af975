"""Scales: which weights share one, those of KV caches, and the bytes that a checkpoint stores of any.

What a weight's or an input's amax becomes is its format's to say (stages/formats). Every amax is a float32
scalar `[]`; so is every scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stages.formats import WeightFormat
from stages.formats.grids import E4M3_MAX
from stages.model.raw import raw_bytes
from stages.settings import DeadPolicy
from stages.unify import Unified, connected, floor_dead, merge
from state.errors import InputError


def kv_scale(amax: Tensor) -> Tensor:
    """The cache scale of K or V: amax / 448, in FP8 and in NVFP4 (modelopt's `postprocess_state_dict`)."""
    return amax / E4M3_MAX


def share_weight_amax(
    recorded: Mapping[str, Tensor],
    formats: Mapping[str, WeightFormat],
    same_input: Sequence[Sequence[str]],
    engine_fused: Sequence[Sequence[str]],
    fused_experts: frozenset[str],
    dead: DeadPolicy,
    one_scale: Mapping[str, str],
) -> Unified:
    """The weight amax of each module whose format has a scale for the whole tensor; names are hub modules.

    Block formats share one over every same-input or engine-fused group, since engines that fuse a group don't
    re-express block scales. FP8 shares one only where the model class stores an expert's projections as one
    parameter, as modelopt does. one_scale: modules that share one in any format → what they have in common:
    a tensor of experts, a linear of the class.

    Raises InputError naming the module for a weight amax that is NaN or infinite.
    """
    unusable = [name for name in formats if not bool(recorded[name].isfinite())]
    if unusable:
        raise InputError(
            f"{', '.join(unusable[:5])}: the weight's amax in the run is {recorded[unusable[0]].item()}; "
            "repair the source checkpoint, whose weights must be finite, and calibrate again"
        )
    groups = [
        [name for name in group if name in formats and formats[name].shared_over == "engine groups"]
        for group in (*same_input, *engine_fused)
    ]
    groups += [
        [
            name
            for name in group
            if name in fused_experts and name in formats and formats[name].shared_over == "fused experts"
        ]
        for group in engine_fused
    ]
    sharing: dict[str, list[str]] = {}
    for name, common in one_scale.items():
        sharing.setdefault(common, []).append(name)
    groups += sharing.values()
    scaled = [name for name in formats if formats[name].tensor_leaf is not None]
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
