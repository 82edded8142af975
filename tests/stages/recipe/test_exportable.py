"""What no checkpoint could hold is refused by the module's name."""

import pytest

from stages.formats import FP8, NVFP4
from stages.model.matrices import StoredMatrix
from stages.recipe.exportable import require_exportable
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.recipes import Recipe
from state.errors import InputError
from state.source import TensorEntry

TENSORS = {"a.weight": TensorEntry("a.weight", "BF16", (4, 24), "model.safetensors", 0, 192)}
RECIPE = Recipe("some", [], "max", {})


def test_widths_and_tied_weights() -> None:
    matrices = {name: StoredMatrix(f"{name}.weight") for name in ("a", "lm_head")}
    require_exportable(QuantizerPlan(RECIPE, {"a": FP8}), matrices, TENSORS)
    with pytest.raises(InputError, match=r"a\.weight has 24 input channels, which nvfp4 blocks of 16"):
        require_exportable(QuantizerPlan(RECIPE, {"a": NVFP4}), matrices, TENSORS)
    with pytest.raises(InputError, match=r"quantizes lm_head\.weight, which the source .* does not hold"):
        require_exportable(QuantizerPlan(RECIPE, {"lm_head": FP8}), matrices, TENSORS)
