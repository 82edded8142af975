"""modelopt's own calibration of a model in memory, as its users run it."""

import contextlib
import io
from collections.abc import Callable

import modelopt.torch.quantization as mtq
from transformers import PreTrainedModel

from stages.recipe.recipes import resolve


def quantized(
    model: PreTrainedModel, recipe: str, loop: Callable[[PreTrainedModel], None]
) -> PreTrainedModel:
    """Calibrate a model that was loaded with its experts one by one (`eager`), as modelopt's quantizers need
    them.

    loop: called once with the model, or once per pass that the recipe needs; every forward within it is
    observed.
    """
    chosen = resolve(recipe)
    algorithm = {"method": chosen.algorithm, **chosen.algorithm_options}
    with contextlib.redirect_stdout(io.StringIO()):
        return mtq.quantize(model, chosen.config() | {"algorithm": algorithm}, loop)
