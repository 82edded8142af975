"""What the modules of a layer multiply with while their inputs are rounded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from stages.calibrate.observe.experts import MATMULS, watch_experts
from stages.calibrate.observe.rounded import Rounder, Rounding, rounded_inputs
from stages.formats import FP8, NVFP4
from stages.formats.fp8 import Fp8
from stages.model.modules import Arrangement, ExpertsModule, LinearModule

HALF = torch.tensor(0.5)
X = torch.tensor([[1.0, 1000.0], [-3.3, 0.26]])
ROUNDED = [[1.0, 224.0], [-3.25, 0.25]]
"""X in FP8 under the scale 1/2."""


class Halving(Fp8):
    """So that what is rounded twice comes out otherwise."""

    def round_input(self, x: Tensor, scale: Tensor) -> Tensor:
        return x / 2


def skeleton(linears: list[LinearModule] | None = None, experts: list[ExpertsModule] | None = None) -> Any:
    return SimpleNamespace(linears=linears or [], experts=experts or [])


class Model(nn.Module):
    """Two layers with the identity as their linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(2, 2, bias=False), "down": nn.Linear(2, 2, bias=False)})
            for _ in range(11)
        )
        for parameter in self.parameters():
            parameter.data.copy_(torch.eye(2))

    def linear(self, layer: int, name: str) -> Any:
        return self.layers[layer][name]


def linear(layer: int, name: str, **fields: Any) -> LinearModule:
    return LinearModule(f"hub.{layer}.{name}", f"layers.{layer}.{name}", 2, 2, **fields)


def test_linears_of_the_layer_that_have_a_rounding_multiply_with_it() -> None:
    model = Model()
    names = skeleton([linear(layer, name) for layer in (1, 10) for name in ("up", "down")])
    roundings = dict.fromkeys(("hub.1.up", "hub.10.up"), (FP8, HALF))
    with rounded_inputs(names, model, "layers.1", roundings):
        assert model.linear(1, "up")(X).tolist() == ROUNDED
        assert model.linear(1, "up")(input=X).tolist() == ROUNDED
        assert model.linear(1, "down")(X).equal(X) and model.linear(10, "up")(X).equal(X)
    assert model.linear(1, "up")(X).equal(X)


def test_observers_that_were_there_before_see_what_is_multiplied() -> None:
    model, seen = Model(), []
    model.linear(1, "up").register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    with rounded_inputs(skeleton([linear(1, "up")]), model, "layers.1", {"hub.1.up": (FP8, HALF)}):
        model.linear(1, "up")(X)
    assert seen == [ROUNDED]


def test_linears_that_the_class_merges_round_their_input_once() -> None:
    model = Model()
    parts = [LinearModule(f"hub.{name}", "layers.1.up", 2, 1, first, True) for first, name in enumerate("ab")]
    roundings: dict[str, Rounding] = {"hub.a": (Halving(), HALF), "hub.b": (Halving(), HALF)}
    with rounded_inputs(skeleton(parts), model, "layers.1", roundings):
        assert model.linear(1, "up")(X).equal(X / 2)


def test_the_gradient_goes_straight_through_what_is_clipped_too() -> None:
    x = X.clone().requires_grad_()
    model = Model()
    weight = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    model.linear(1, "up").weight.data.copy_(weight)
    with rounded_inputs(skeleton([linear(1, "up")]), model, "layers.1", {"hub.1.up": (FP8, HALF)}):
        output = model.linear(1, "up")(x)
    assert output.tolist() == (torch.tensor(ROUNDED) @ weight.T).tolist()
    output.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[7.0, 10.0], [7.0, 10.0]]
    # That of the weight is of the rounded input.
    assert model.linear(1, "up").weight.grad.tolist() == [[-2.25, 224.25], [-2.25, 224.25]]


def test_the_format_rounds() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale = torch.tensor(0.001)
    assert Rounder()(x, (NVFP4, scale)).equal(NVFP4.round_input(x, scale))


def test_one_tensor_is_rounded_once_under_equal_scales() -> None:
    rounder = Rounder()
    half, same = rounder.known((FP8, HALF)), rounder.known((FP8, HALF.clone()))
    first = rounder(X, half)
    assert rounder(X, same) is first and first.tolist() == ROUNDED
    other = rounder(X, rounder.known((FP8, 4 * HALF)))
    assert other.tolist() == [[1.0, 896.0], [-3.25, 0.25]]
    assert rounder(X, half) is not first  # only the last one is kept
    assert rounder(X.clone(), half).tolist() == ROUNDED


# Experts

SIZES = {"hidden_size": 16, "num_local_experts": 3, "intermediate_size": 16}


def qwen(implementation: str) -> nn.Module:
    config = Qwen3MoeConfig(hidden_size=16, num_experts=3, moe_intermediate_size=16, hidden_act="silu")
    config._experts_implementation = implementation
    return Qwen3MoeExperts(config)


def gpt_oss(implementation: str) -> nn.Module:
    config = GptOssConfig(**SIZES)
    config._experts_implementation = implementation
    return GptOssExperts(config)


MODULES = {
    "qwen3_moe eager": (lambda: qwen("eager"), Arrangement(True, False, False, False)),
    "qwen3_moe grouped": (lambda: qwen("grouped_mm"), Arrangement(True, False, False, False)),
    "gpt_oss eager": (lambda: gpt_oss("eager"), Arrangement(True, True, True, True)),
    "gpt_oss grouped": (lambda: gpt_oss("grouped_mm"), Arrangement(True, True, True, True)),
    "llama4": (
        lambda: Llama4TextExperts(Llama4TextConfig(**SIZES, hidden_act="silu")),
        Arrangement(True, True, False, False),
    ),
}
TOKENS = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * 3
CHOICE = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])  # none goes to the last expert


UP, DOWN = NVFP4.input_scale(torch.tensor(8.0)), NVFP4.input_scale(torch.tensor(2.0))
SCALES = {"gate": UP, "down": DOWN}

Rows = dict[tuple[str, int], Tensor]


class Layer:
    """A layer with nothing but experts, with random weights."""

    def __init__(self, name: str) -> None:
        make, arranged = MODULES[name]
        self.experts = ExpertsModule(
            "hub.experts", "layer.experts", 3, ("gate", "up"), "down", "gate_up_proj", 16, 16, False, arranged
        )
        self.module = make()
        chance = torch.Generator().manual_seed(2)
        for parameter in self.module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=chance) / 4)
        self.model = nn.ModuleDict({"layer": nn.ModuleDict({"experts": self.module})})

    def forward(self, *leaves: str) -> tuple[Tensor, Rows]:
        """The output while these projections' inputs are rounded, and by (projection, expert) the rows that
        an observer sees who was there before."""
        roundings = {
            f"hub.experts.{expert}.{leaf}": (NVFP4, SCALES[leaf]) for expert in range(3) for leaf in leaves
        }
        seen: Rows = {}

        def grouped(projection: str, rows: Tensor, ends: Tensor) -> None:
            starts = [0, *ends.tolist()]
            for expert in range(3):
                seen[projection, expert] = rows[starts[expert] : starts[expert + 1]].detach().clone()

        def single(projection: str, rows: Tensor, expert: int) -> None:
            seen[projection, expert] = rows.detach().clone()

        hooks = watch_experts("experts", self.module, grouped, single)
        with rounded_inputs(skeleton(experts=[self.experts]), self.model, "layer", roundings):
            output = self._call()
        for hook in hooks:
            hook.remove()
        return output, {place: rows for place, rows in seen.items() if len(rows)}

    def _call(self) -> Tensor:
        if isinstance(self.module, Llama4TextExperts):
            rows = torch.stack([TOKENS, TOKENS, torch.zeros_like(TOKENS)])
            rows[0, 4:], rows[1, :2] = 0, 0  # where a token is not the expert's
            return self.module(rows.flatten(0, 1))
        return self.module(TOKENS, CHOICE, torch.ones(6, 2))


@pytest.mark.parametrize("name", MODULES)
def test_experts_multiply_with_rounded_rows_twice(name: str) -> None:
    """The second projection's are made of the first one's products, which come of rounded rows already."""
    layer = Layer(name)
    plain, exact = layer.forward()
    output, first = layer.forward("gate")
    both_output, both = layer.forward("gate", "down")
    assert first.keys() == both.keys() == exact.keys()
    assert exact.keys() == {(projection, expert) for projection in ("up", "down") for expert in (0, 1)}
    for expert in (0, 1):
        rounded = NVFP4.round_input(exact["up", expert], UP)
        assert first["up", expert].equal(rounded) and both["up", expert].equal(rounded)
        assert not rounded.equal(exact["up", expert])
        assert not first["down", expert].equal(exact["down", expert])
        assert both["down", expert].equal(NVFP4.round_input(first["down", expert], DOWN))
        assert not both["down", expert].equal(first["down", expert])
    assert not output.equal(plain) and not both_output.equal(output)
    assert layer.forward()[0].equal(plain)


@pytest.mark.parametrize("name", MODULES)
def test_the_gradient_of_experts_is_of_the_rounded_rows(name: str) -> None:
    layer = Layer(name)
    output, rows = layer.forward("gate", "down")
    output.sum().backward()
    gradient = layer.module.down_proj.grad
    for expert in (0, 1):
        expected = rows["down", expert].sum(0)[None].expand(16, 16)
        own = gradient[expert].T if layer.experts.arranged.transposed else gradient[expert]
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    assert not gradient[2].any() and layer.module.gate_up_proj.grad[:2].flatten(1).any(1).all()


def test_everything_is_put_back() -> None:
    holders = [(holder, name) for holder, name in MATMULS if hasattr(holder, name)]
    before = [(getattr(holder, name), name in vars(holder)) for holder, name in holders]
    Layer("gpt_oss eager").forward("gate", "down")
    assert [(getattr(holder, name), name in vars(holder)) for holder, name in holders] == before
