"""Memory that tuning takes of a GPU, before anything is computed."""

import pytest
import torch

from stages.calibrate import tunable
from stages.calibrate.tunable import largest_layer, require_room
from stages.recipe.solvers import Solver
from state.errors import InputError

MATRICES = {
    "model.layers.0.self_attn.q_proj": (8, 4),
    "model.layers.0.self_attn.k_proj": (2, 4),
    "model.layers.1.mlp.experts.0.up_proj": (6, 4),
    "model.layers.1.mlp.experts.1.up_proj": (6, 4),
    "model.layers.1.mlp.experts.0.down_proj": (4, 6),
    "lm_head": (1000, 1000),
}
GPU = torch.device("cuda", 0)
TUNE = Solver("tune", False, True, 0.01, 1.0, "tune-00000000")


def test_the_largest_layer() -> None:
    """20 bytes for each of 72 parameters; 4 for each of H's elements: two of 4 x 4 and one of 6 x 6."""
    assert largest_layer(MATRICES) == (1, 72 * 20 + (16 + 16 + 36) * 4)
    # q and k read the same input.
    assert largest_layer({name: shape for name, shape in MATRICES.items() if ".0.self" in name}) == (
        0,
        40 * 20 + 16 * 4,
    )


def test_a_layer_that_does_not_fit_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = largest_layer(MATRICES)[1]
    free = int(needed / tunable.SHARE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free + 2, 0))
    require_room(TUNE, "nvfp4_tuned", MATRICES, GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 2, 0))
    with pytest.raises(
        InputError, match=r"'nvfp4_tuned' tunes a whole layer at a time: layer 1 takes .* GPTQ"
    ):
        require_room(TUNE, "nvfp4_tuned", MATRICES, GPU)


def test_other_solvers_and_other_devices_are_not_asked() -> None:
    require_room(TUNE, "nvfp4_tuned", MATRICES, torch.device("cpu"))
    require_room(Solver("gptq", False, True, 0.01, 1.0, "gptq-00000000"), "gptq", MATRICES, GPU)
