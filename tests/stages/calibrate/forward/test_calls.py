from collections import UserDict

import pytest
import torch
from torch import nn

from stages.calibrate.forward.beside import Beside
from stages.calibrate.forward.buffers import HIDDEN, Limits
from stages.calibrate.forward.calls import (
    Calls,
    Carried,
    Hidden,
    LayerCall,
    Leaf,
    Returned,
    differing,
)
from stages.calibrate.forward.carried import pack_carried
from stages.model.decoder import LayerwiseUnsupported

CPU = torch.device("cpu")
SHAPE = torch.Size([2, 3])


def call_with(*leaves) -> LayerCall:
    return LayerCall(((Hidden(), *(Leaf(index) for index in range(len(leaves)))), {}), leaves)


def open_calls(tmp_path, host: int = 1 << 20) -> Calls:
    return Calls(tmp_path, 3, CPU, Limits(device=0, host=host), Beside(CPU))


def test_differing_names_the_tensors_that_are_not_equal():
    mask = torch.ones(2)
    left = call_with(mask, None, torch.tensor([1.0, 2.0]))
    right = call_with(mask.clone(), None, torch.tensor([1.0, 3.0]))
    assert differing(left, right) == [2]


@pytest.mark.parametrize("other", [call_with(0.5), call_with(torch.ones(2), None), call_with(None)])
def test_differing_refuses_anything_else(other):
    with pytest.raises(LayerwiseUnsupported):
        differing(call_with(torch.ones(2)), other)


@pytest.mark.parametrize("host", [1 << 20, 0], ids=["memory", "files"])
def test_a_batch_gets_its_own_tensors_and_shares_the_others(host, tmp_path):
    calls = open_calls(tmp_path, host)
    mask = torch.ones(2)
    for batch, value in enumerate([5.0, 6.0, 5.0]):
        calls.add(batch, SHAPE, (call_with(mask.clone(), torch.tensor([value])),))
    hidden = torch.zeros(1)
    for batch, value in enumerate([5.0, 6.0, 5.0]):
        bound = calls.bind(0, batch, {HIDDEN: hidden})
        assert bound.args[0] is hidden
        assert torch.equal(bound.args[1], mask)
        assert torch.equal(bound.args[2], torch.tensor([value]))
    calls.drop(0)
    assert list(tmp_path.iterdir()) == []


def test_batches_of_another_shape_have_calls_of_their_own(tmp_path):
    calls = open_calls(tmp_path)
    calls.add(0, SHAPE, (call_with(torch.ones(2, 3)),))
    calls.add(1, torch.Size([1, 3]), (call_with(torch.ones(1, 3)),))
    assert calls.bind(0, 0, {HIDDEN: torch.zeros(1)}).args[1].shape == (2, 3)
    assert calls.bind(0, 1, {HIDDEN: torch.zeros(1)}).args[1].shape == (1, 3)


class Shares(nn.Module):
    """Leaves keys and values for later layers, as Gemma 4 and Gemma 3n do."""

    def forward(self, hidden, shared):
        shared["sliding"] = (hidden + 1, hidden + 2)
        shared[3] = hidden + 3
        return hidden * 2


class Reads(nn.Module):
    def forward(self, hidden, shared):
        key, value = shared["sliding"]
        return hidden + key + value + shared[3]


def test_state_shared_between_layers_is_carried_by_name(tmp_path):
    calls = open_calls(tmp_path)
    call = LayerCall(((Hidden(),), {"shared": Carried("shared", UserDict)}), ())
    calls.add(0, SHAPE, (call, call))
    state = calls.bind(0, 0, {HIDDEN: torch.tensor([1.0])}).run(Shares(), 0)
    assert {name: value.tolist() for name, value in state.items()} == {
        "hidden": [2.0],
        '["shared", "sliding", 0]': [2.0],
        '["shared", "sliding", 1]': [3.0],
        '["shared", 3]': [4.0],
    }
    bound = calls.bind(1, 0, state)
    assert isinstance(bound.kwargs["shared"], UserDict)
    assert bound.run(Reads(), 0)[HIDDEN].tolist() == [11.0]


class ReturnsMore(nn.Module):
    def forward(self, hidden, earlier):
        return hidden + 1, hidden * 10 if earlier is None else earlier + 1


def test_values_returned_for_the_next_layer_are_carried_while_one_needs_them(tmp_path):
    calls = open_calls(tmp_path)
    first = LayerCall(((Hidden(), Leaf(0)), {}), (None,))
    later = LayerCall(((Hidden(), Returned(1)), {}), ())
    calls.add(0, SHAPE, (first, later))
    state = calls.bind(0, 0, {HIDDEN: torch.tensor([1.0])}).run(ReturnsMore(), 2)
    assert {name: value.tolist() for name, value in state.items()} == {"hidden": [2.0], "[1]": [10.0]}
    bound = calls.bind(1, 0, state)
    assert bound.args[1].tolist() == [10.0]
    assert list(bound.run(ReturnsMore(), 2)) == ["hidden"]


def test_a_layer_that_returns_something_else_is_refused(tmp_path):
    calls = open_calls(tmp_path)
    calls.add(0, SHAPE, (LayerCall(((Hidden(), Leaf(0)), {}), (None,)),))
    with pytest.raises(LayerwiseUnsupported, match="ReturnsMore returns a tuple"):
        calls.bind(0, 0, {HIDDEN: torch.ones(1)}).run(ReturnsMore(), 0)


@pytest.mark.parametrize("mapping", [{"a": 1}, {"a": [torch.ones(1)]}, {(0, 1): torch.ones(1)}])
def test_other_carried_state_is_refused(mapping):
    with pytest.raises(LayerwiseUnsupported, match="shared"):
        pack_carried({"shared": mapping})
