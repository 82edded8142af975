"""The rows each expert sees, whichever way its module multiplies them."""

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Llama4TextConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from stages.calibrate.observe.experts import MATMULS, watch_experts

SIZES = {"hidden_size": 2, "intermediate_size": 2, "num_local_experts": 3}

Rows = dict[tuple[str, int], list[list[float]]]


def watched(module: nn.Module, *arguments: torch.Tensor) -> Rows:
    """(projection, expert) → the rows that it multiplied in one forward."""
    seen: Rows = {}

    def grouped(projection: str, rows: torch.Tensor, ends: torch.Tensor) -> None:
        start = 0
        for expert, end in enumerate(ends.tolist()):
            seen[projection, expert] = rows[start:end].tolist()
            start = end

    def single(projection: str, rows: torch.Tensor, expert: int) -> None:
        seen[projection, expert] = rows.tolist()

    hooks = watch_experts("experts", module, grouped, single)
    with torch.inference_mode():
        module(*arguments)
    for hook in hooks:
        hook.remove()
    return seen


def test_llama_4_counts_what_was_routed() -> None:
    module = Llama4TextExperts(Llama4TextConfig(**SIZES, hidden_act="relu"))
    with torch.no_grad():
        # gate is x, up twice x: down reads 2 x² where x is positive, and zeros where it is not.
        module.gate_up_proj.copy_(torch.cat([torch.eye(2), 2 * torch.eye(2)], 1).expand(3, 2, 4))
        module.down_proj.zero_()
    zeros = [0.0, 0.0]
    rows = [[[1.0, 0.0], zeros], [[0.0, -1.0], [3.0, 4.0]], [zeros, zeros]]
    assert watched(module, torch.tensor(rows).flatten(0, 1)) == {
        ("up", 0): [[1.0, 0.0]],
        ("up", 1): [[0.0, -1.0], [3.0, 4.0]],
        ("up", 2): [],
        ("down", 0): [[2.0, 0.0]],
        ("down", 1): [[0.0, 0.0], [18.0, 32.0]],
        ("down", 2): [],
    }


@pytest.mark.parametrize("projection", ["up", "down"])
def test_the_loop_over_experts_of_gpt_oss(projection: str) -> None:
    config = GptOssConfig(**SIZES)
    config._experts_implementation = "eager"
    module = GptOssExperts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.gate_up_proj_bias[:, 0::2] = 7.0  # sigmoid(7 · 1.702) is 1 but for 7e-6
    rows, choice = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2], [0]])
    seen = watched(module, rows, choice, torch.ones(2, 1))
    assert seen.keys() == {(which, expert) for which in ("up", "down") for expert in (0, 2)}
    if projection == "up":
        assert (seen["up", 2], seen["up", 0]) == ([[1.0, 2.0]], [[3.0, 4.0]])
    else:
        torch.testing.assert_close(torch.tensor(seen["down", 0]), torch.full((1, 2), 7.0), rtol=1e-4, atol=0)


def test_everything_is_put_back() -> None:
    holders = [(holder, name) for holder, name in MATMULS if hasattr(holder, name)]
    before = [(getattr(holder, name), name in vars(holder)) for holder, name in holders]
    test_llama_4_counts_what_was_routed()
    assert [(getattr(holder, name), name in vars(holder)) for holder, name in holders] == before
