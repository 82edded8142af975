"""Whether a model can be computed one layer at a time where it has to be, and what to do where it can't."""

import torch

from stages.calibrate.forward.layer_weights import Weights
from stages.model.decoder import LayerwiseUnsupported, find_decoder
from stages.model.skeleton import Skeleton
from stages.recipe.solvers import Solver
from stages.settings import CalibrateSettings
from state.errors import InputError
from state.source import Source


def require_layers(
    settings: CalibrateSettings, skeleton: Skeleton, source: Source, solver: Solver | None, probed: bool
) -> None:
    """Raise InputError where layers are needed one by one and that can't be.

    probed: whether the model's sites are known without its weights.
    """
    if solver is None and settings.schedule != "layerwise":
        return
    try:
        decoder = find_decoder(skeleton.model)
        Weights(decoder, skeleton.parameter_of, source, torch.device("cpu"))
        if not probed:
            raise LayerwiseUnsupported(
                f"{decoder.model_name} shows its sites only once its weights are loaded"
            )
    except LayerwiseUnsupported as error:
        raise refusal(error, settings, solver) from error


def refusal(error: LayerwiseUnsupported, settings: CalibrateSettings, solver: Solver | None) -> InputError:
    """The error with a way out that is one: a solver works layer by layer under every schedule.

    solver: of the recipe, where it needs a pass.
    """
    if solver is None:
        return error
    return InputError(
        f"{error.reason}. Recipe {settings.recipe!r} is solved layer by layer: choose one without a solver, "
        "such as nvfp4"
    )
