"""How modules hold their experts, from what they say and from shapes."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Llama4TextConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from stages.model.modules import Arrangement, arrangement

SIZES = {"hidden_size": 8, "intermediate_size": 4, "num_local_experts": 2}


def module(**shapes: Iterable[int]) -> nn.Module:
    made = nn.Module()
    for name, shape in shapes.items():
        made.register_parameter(name, nn.Parameter(torch.zeros(*shape)))
    return made


def test_the_registry_is_asked() -> None:
    assert arrangement(GptOssExperts(GptOssConfig(**SIZES))) == Arrangement(
        gated=True, transposed=True, interleaved=True, biased=True
    )


def test_llama_4_is_known_by_its_shapes() -> None:
    assert arrangement(Llama4TextExperts(Llama4TextConfig(**SIZES))) == Arrangement(
        gated=True, transposed=True, interleaved=False, biased=False
    )


@pytest.mark.parametrize(
    "other",
    [
        module(gate_up_proj=(2, 8, 8), down_proj=(2, 8, 4)),  # not transposed
        module(gate_up_proj=(2, 8, 8), down_proj=(2, 4, 8), bias=(2, 8)),
        module(gate_up_proj=(8, 8), down_proj=(4, 8)),
        module(up_proj=(2, 8, 4), down_proj=(2, 4, 8)),
        module(),
    ],
    ids=["others", "more", "no experts", "no gate", "nothing"],
)
def test_everything_else_is_unknown(other: nn.Module) -> None:
    assert arrangement(other) is None
