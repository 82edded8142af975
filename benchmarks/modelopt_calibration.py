"""modelopt's own calibration of a model in memory, as its users run it."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from transformers import PreTrainedModel

from stages.calibrate.load import load_model
from stages.recipes import resolve


def quantized(
    folder: Path, device: torch.device, recipe: str, loop: Callable[[PreTrainedModel], None]
) -> PreTrainedModel:
    """Load the model with its experts one by one, as modelopt's quantizers need them, and calibrate it.

    loop: called once with the model; every forward within it is observed.
    """
    chosen = resolve(recipe)
    model = load_model(folder, device, "eager")
    with contextlib.redirect_stdout(io.StringIO()):
        return mtq.quantize(model, chosen.config() | {"algorithm": chosen.algorithm}, loop)
