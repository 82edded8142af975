"""What holds is folded, what changes anything that a layer hands on is not, and the layer stays as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stages.fold.candidates import Attempt, LayerParts, attempts
from stages.fold.folds import FoldSite, Operand
from stages.fold.trial import TrialLayer, Verdict, try_all

WIDTH, INNER = 8, 6


class Layer(nn.Module):
    """norm → gate and up → down. The parts that make a difference are arguments."""

    def __init__(self, act: Callable[[Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH) if not bias else nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=bias)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.act = act

    def read(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        normed = self.read(hidden)
        return {"hidden": hidden + self.down(self.act(self.gate(normed), self.up(normed)))}


class PlusOne(Layer):
    """As Gemma's norms."""

    def read(self, hidden: Tensor) -> Tensor:
        normed = nn.functional.rms_norm(hidden, (WIDTH,))
        return normed * (1 + self.norm.weight)


class AlsoHandedOn(Layer):
    """A second reader of the norm, which no forward shows."""

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return super().forward(hidden) | {"shared": self.norm(hidden).sum(-1)}


class Unused(Layer):
    """A layer whose output depends on nothing of its own."""

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"hidden": super().forward(hidden)["hidden"] * 0}


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up.clamp(-7, 7)


def shifted(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * (up + 1)


def squared(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up.relu().square()


def verdict(layer: Layer) -> Verdict:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0)
    hidden = torch.randn(16, WIDTH)
    operands = {
        name: Operand(name, f"{name}.weight", tuple(layer.get_parameter(f"{name}.weight").shape))
        for name in ("gate", "up", "down")
    }
    shapes = {name: tuple(held.shape) for name, held in layer.named_parameters()}
    parts = LayerParts(
        operands, {"norm": ["gate", "up"]}, reads={"gate": 1, "up": 1, "down": 2}, shapes=shapes
    )
    before = {name: held.clone() for name, held in layer.state_dict().items()}
    with torch.inference_mode():
        found = try_all(
            attempts(parts),
            TrialLayer(lambda part: layer.get_parameter(part.tensor).detach(), lambda: layer(hidden)),
        )
    for name, held in layer.state_dict().items():
        assert torch.equal(held, before[name]), name
    return found


def names(found: Verdict) -> list[tuple[str, bool, int]]:
    return [(site.name, site.plus_one, site.degree) for site in found.sites]


@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_layer_folds(bias: bool) -> None:
    found = verdict(Layer(gated, bias))
    assert names(found) == [("norm", False, 1), ("up", False, 1)]
    assert [len(site.sources) for site in found.sites] == ([2, 2] if bias else [1, 1])
    assert found.failed == {}


def test_a_norm_that_adds_one() -> None:
    assert names(verdict(PlusOne(gated))) == [("norm", True, 1), ("up", False, 1)]


def test_a_square_takes_the_root() -> None:
    assert names(verdict(Layer(squared))) == [("norm", False, 1), ("up", False, 2)]


@pytest.mark.parametrize("between", [clamped, shifted])
def test_what_stands_between(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = verdict(Layer(between))
    assert names(found) == [("norm", False, 1)]
    assert found.failed == {"down": "what stands between up and down doesn't let a scale through"}


def test_a_second_reader_that_nothing_showed() -> None:
    found = verdict(AlsoHandedOn(gated))
    assert names(found) == [("up", False, 1)]
    why = "dividing norm and multiplying what is seen to read it changes what the layer hands on"
    assert found.failed == {"gate": why, "up": why}


def test_what_changes_nothing_proves_nothing() -> None:
    assert names(verdict(Unused(gated))) == []


def test_numbers_that_are_none_prove_nothing() -> None:
    layer = Layer(lambda gate, up: gate * float("nan"))
    assert set(verdict(layer).failed.values()) == {
        "the layer's own outputs are not numbers, which proves nothing"
    }


def test_a_part_that_memory_keeps_otherwise_is_not_folded() -> None:
    part = Operand("up", "up.weight", (INNER, WIDTH))
    site = FoldSite("up_to_down", "up", INNER, (part,), (Operand("down", "down.weight", (WIDTH, INNER)),))
    attempt = Attempt(("down",), ((site,),), "why")
    found = try_all([attempt], TrialLayer(lambda _: None, lambda: {"hidden": torch.ones(1)}))
    assert (found.sites, found.failed) == ((), {"down": "why"})
