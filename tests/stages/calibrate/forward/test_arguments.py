import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.calibrate.forward.arguments import capture_arguments, examine, finish, require_independence
from stages.calibrate.forward.calls import Carried, Hidden, Leaf, Returned
from stages.model.decoder import Decoder, LayerwiseUnsupported

TOKENS = torch.tensor([[1, 2, 3]])


class Layer(nn.Module):
    kind = "full"

    def forward(self, *args, **kwargs):
        raise AssertionError("a stand-in takes the layer's place")


class Parent(nn.Module):
    """A model of three layers; `between` is what it does around them."""

    def __init__(self, between):
        super().__init__()
        self.config = SimpleNamespace()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 8)
        self.between = between

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        hidden = self.between(self, self.embed(input_ids))
        return self.head(hidden * 2)


def decoder_of(between) -> Decoder:
    model = Parent(between)
    return Decoder(model, "layers", model.layers)


def plain(model, hidden):
    mask = torch.ones(3, 3)
    shared = {}
    for layer in model.layers:
        hidden = layer(hidden, mask, shared=shared, scale=0.5, pair=(mask, None), kind=layer.kind)
    return hidden


def hands_on_the_embedding(model, hidden):
    embedding = hidden
    for layer in model.layers:
        hidden = layer(hidden, embedding=embedding)
    return hidden


def check(decoder: Decoder) -> None:
    returns, taken = examine(decoder, TOKENS)
    require_independence(decoder, TOKENS, returns, taken.calls)


def test_arguments_are_recorded_with_the_hidden_state_left_open():
    decoder = decoder_of(plain)
    assert examine(decoder, TOKENS)[0] == 0
    taken = capture_arguments(decoder, TOKENS, 0)
    assert torch.equal(taken.hidden, decoder.model.embed(TOKENS))
    assert len(taken.calls) == 3
    args, kwargs = taken.calls[2].template
    assert args == (Hidden(), Leaf(0))
    assert kwargs == {
        "shared": Carried("shared", dict), "scale": Leaf(1), "pair": (Leaf(2), Leaf(3)), "kind": Leaf(4),
    }  # fmt: skip
    assert torch.equal(taken.calls[2].leaves[0], torch.ones(3, 3))
    assert taken.calls[2].leaves[1::2] == (0.5, None)
    assert taken.calls[2].leaves[4] == "full"


def test_layer_0_gets_a_copy_of_what_other_layers_are_handed_too():
    taken = capture_arguments(decoder_of(hands_on_the_embedding), TOKENS, 0)
    assert torch.equal(taken.entering(), taken.hidden) and taken.entering() is not taken.hidden
    plainly = capture_arguments(decoder_of(plain), TOKENS, 0)
    assert plainly.entering() is plainly.hidden


def test_layers_are_back_in_place_after_a_capture():
    decoder = decoder_of(plain)
    layers = list(decoder.layers)
    capture_arguments(decoder, TOKENS, 0)
    assert all(left is right for left, right in zip(decoder.layers, layers, strict=True))


def test_finish_gives_the_head_what_it_gets_of_the_last_layers_output():
    decoder, found = decoder_of(plain), []
    decoder.model.head.register_forward_pre_hook(lambda head, args: found.append(args[0]))
    finish(decoder, TOKENS, lambda: torch.full((1, 3, 4), 3.0), 0)
    assert len(found) == 1 and torch.equal(found[0], torch.full((1, 3, 4), 6.0))


def takes_two_values(model, hidden):
    extra = None
    for layer in model.layers:
        hidden, extra = layer(hidden, extra)
    return hidden


def test_values_returned_beside_the_hidden_state():
    decoder = decoder_of(takes_two_values)
    assert examine(decoder, TOKENS)[0] == 2
    first, second, _ = capture_arguments(decoder, TOKENS, 2).calls
    assert first.template == ((Hidden(), Leaf(0)), {})
    assert second.template == ((Hidden(), Returned(1)), {})


@pytest.mark.parametrize("parent", [plain, takes_two_values])
def test_what_was_captured_does_not_wait_for_the_garbage_collector(parent):
    """A reference cycle would keep it, for failed attempts too."""
    decoder, embedded = decoder_of(parent), []
    decoder.model.embed.register_forward_hook(lambda *call: embedded.append(weakref.ref(call[-1])))
    gc.disable()
    try:
        check(decoder)
        assert embedded and all(hidden() is None for hidden in embedded)
    finally:
        gc.enable()


def test_the_embedding_may_go_to_every_layer():
    decoder = decoder_of(hands_on_the_embedding)
    check(decoder)
    call = capture_arguments(decoder, TOKENS, 0).calls[1]
    assert call.template == ((Hidden(),), {"embedding": Leaf(0)})
    assert torch.equal(call.leaves[0], decoder.model.embed(TOKENS))


def slices_to_all_tokens(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden[:, -0:, :])
    return hidden


def test_a_slice_of_all_tokens_is_the_hidden_state():
    decoder = decoder_of(slices_to_all_tokens)
    check(decoder)
    assert capture_arguments(decoder, TOKENS, 0).calls[1].template == ((Hidden(),), {})


def leaves_the_first_token_out(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden[:, 1:, :])
    return hidden


def adds_to_a_slice_in_place(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden)[:, -0:, :]
        hidden += 1
    return hidden


def adds_between_layers(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden) + 1
    return hidden


def adds_in_place_between_layers(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden)
        hidden += 1
    return hidden


def computes_an_argument_from_a_hidden_state(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden, gate=hidden.mean())
    return hidden


def passes_on_an_earlier_output(model, hidden):
    first = hidden = model.layers[0](hidden)
    for layer in model.layers[1:]:
        hidden = layer(hidden, skip=first)
    return hidden


def calls_in_reverse(model, hidden):
    for layer in reversed(model.layers):
        hidden = layer(hidden)
    return hidden


def leaves_one_out(model, hidden):
    for layer in model.layers[:2]:
        hidden = layer(hidden)
    return hidden


def passes_an_object(model, hidden):
    for layer in model.layers:
        hidden = layer(hidden, cache=object())
    return hidden


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        (adds_between_layers, r"changes the hidden state between layers\.0 and layers\.1"),
        (adds_in_place_between_layers, r"changes the hidden state between layers\.0 and layers\.1"),
        (leaves_the_first_token_out, r"changes the hidden state between layers\.0 and layers\.1"),
        (adds_to_a_slice_in_place, r"changes the hidden state between layers\.0 and layers\.1"),
        (computes_an_argument_from_a_hidden_state, r"computes arguments of layers\.1 from hidden states"),
        (passes_on_an_earlier_output, r"argument skip of layers\.2 is an earlier layer's output"),
        (calls_in_reverse, r"layers\.2 is called when layers\.0 should be"),
        (leaves_one_out, r"called 2 of its 3 layers"),
        (passes_an_object, r"argument cache of layers\.0 can't be replayed: a object"),
    ],
)
def test_parents_that_cannot_be_replayed_are_refused(parent, message):
    with pytest.raises(LayerwiseUnsupported, match=message + ".*--schedule whole"):
        check(decoder_of(parent))
