"""What can't be served of experts that lie in one tensor, in words for people."""

from collections.abc import Sequence

from stages.formats import TABLE
from stages.model.modules import ExpertsModule
from state.errors import InputError

ALONE = "one that leaves the experts alone, such as general/ptq/nvfp4_omlp_only-kv_fp8"


def without_quantizers(experts: ExpertsModule, kind: str) -> InputError:
    """modelopt has no place for quantizers in the class."""
    return InputError(
        f"modelopt knows no quantizers for {experts.memory} ({kind}), which keeps its experts in one tensor; "
        "such models are not supported yet"
    )


def with_biases_apart(experts: ExpertsModule, recipe: str) -> InputError:
    """No engine is known to read experts one by one whose biases are in one tensor."""
    return InputError(
        f"recipe {recipe!r} quantizes {experts.hub}, whose experts have biases and are stored fused in one "
        f"tensor, and modelopt would write them one by one; that is not supported yet: choose {ALONE}"
    )


def in_several_formats(experts: ExpertsModule, recipe: str, formats: Sequence[str]) -> InputError:
    """modelopt's configuration has one entry for all of a layer's experts."""
    return InputError(
        f"recipe {recipe!r} quantizes the projections of {experts.hub} to {' and '.join(sorted(formats))}, "
        f"and modelopt's configuration names one format for them: choose a recipe that does so, or {ALONE}"
    )


def without_layout(experts: ExpertsModule, recipe: str, weight_format: str) -> InputError:
    """modelopt has no layout for experts of the format in one tensor."""
    held = ", ".join(name for name, other in TABLE.items() if other.holds_together)
    return InputError(
        f"recipe {recipe!r} quantizes {experts.hub} to {weight_format}, and modelopt keeps these experts in "
        f"one tensor, which it can write in {held} alone; choose a recipe of these, or {ALONE}"
    )
