"""The second stream: any layer run from it again and again, and then once and for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.calibrate.forward.beside import Beside
from stages.calibrate.forward.buffers import HIDDEN, Limits
from stages.calibrate.forward.calls import Calls, Hidden, LayerCall, Leaf
from stages.calibrate.forward.hidden import HiddenStates
from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.forward.replay import Replay
from state.errors import Stopped
from tests.stages.calibrate.families import save_tiny
from tests.stages.calibrate.forward.test_layers import FILES, MEMORY, open_forward

CPU = torch.device("cpu")
FIRST = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])]
SECOND = [torch.tensor([[[1.5, 2.5]]]), torch.tensor([[[3.5, 4.5]]])]


class Adds(nn.Module):
    """Adds what its batch is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, hidden: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight + own


@pytest.fixture(params=[1 << 20, 0], ids=["memory", "files"])
def replay(request: pytest.FixtureRequest, tmp_path: Path) -> Replay:
    """Two batches of one window, before a layer whose calls differ: 10 and 20 are added."""
    limits = Limits(device=0, host=request.param)
    calls = Calls(tmp_path / "arguments", 2, CPU, limits, Beside(CPU))
    for batch, own in enumerate((10.0, 20.0)):
        call = LayerCall(((Hidden(), Leaf(0)), {}), (torch.tensor(own),))
        calls.add(batch, torch.Size([1, 1]), (call,))
    states = [HiddenStates(tmp_path / name, 2, CPU, limits, {}, print) for name in ("first", "second")]
    first, second = states
    for batch in range(2):
        second.enter(batch, {HIDDEN: SECOND[batch].clone()})
        first.write(batch, {HIDDEN: FIRST[batch].clone()})
    return Replay(calls, 0, 0, first, second, 2)


def test_a_batch_is_run_from_the_second_stream_again_and_again(replay: Replay) -> None:
    layer = Adds()
    for _ in range(2):
        assert replay.run(0, layer)[HIDDEN].tolist() == [[[13.0, 15.0]]]
        assert replay.run(1, layer)[HIDDEN].tolist() == [[[27.0, 29.0]]]


def test_a_gradient_flows_into_what_stands_for_the_layer(replay: Replay) -> None:
    layer = Adds()
    replay.run(1, layer)[HIDDEN].sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.item() == 3.5 + 4.5


def test_another_state_is_run_as_the_batch_is(replay: Replay) -> None:
    state = {HIDDEN: torch.tensor([[[1.0, 0.0]]])}
    assert replay.call(1, state, Adds())[HIDDEN].tolist() == [[[22.0, 20.0]]]


def test_the_target_is_the_first_streams(replay: Replay) -> None:
    for _ in range(2):
        assert [replay.target(batch).tolist() for batch in range(2)] == [[[[1.0, 2.0]]], [[[3.0, 4.0]]]]


def test_a_sweep_is_seen_by_hooks_and_moves_nothing(replay: Replay) -> None:
    layer, seen = Adds(), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for _ in range(2):
        replay.sweep(layer)
    assert all(torch.equal(left, right) for left, right in zip(seen, SECOND * 2, strict=True))
    assert replay.second.layer == 0 and replay.second.peek(1)[HIDDEN].equal(SECOND[1])


def test_advancing_puts_the_stream_behind_the_layer(replay: Replay) -> None:
    replay.sweep(Adds())
    replay.advance(Adds())
    replay.first.turn()
    replay.second.turn()
    assert replay.second.layer == 1
    assert [replay.second.read(batch)[HIDDEN].tolist() for batch in range(2)] == [
        [[[13.0, 15.0]]],
        [[[27.0, 29.0]]],
    ]
    assert replay.first.read(1)[HIDDEN].equal(FIRST[1])


# In a whole model


def advance(step: LayerStep) -> None:
    """The second stream through the layer as it is."""
    assert step.replay is not None
    step.replay.advance(step.module)


@pytest.mark.parametrize("limits", [MEMORY, FILES], ids=["memory", "files"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma4", "gemma3n", "glm_moe_dsa", "qwen3_next"])
def test_unchanged_layers_give_the_first_stream_again(family: str, limits: Limits, tmp_path: Path) -> None:
    """With what a layer hands on beside hidden states, which Gemma 3n and 4 and DSA do."""
    model, found = save_tiny(family, tmp_path / "model"), 0
    with open_forward(model, tmp_path / "run", limits, recompute=advance) as forward:
        forward.start()
        for step in forward.steps():
            assert step.replay is not None
            step.replay.sweep(step.module)
            again = [step.replay.run(batch, step.module) for batch in range(3)]
            advance(step)
            for batch in range(3):
                assert again[batch][HIDDEN].equal(step.replay.target(batch))
                behind = step.states.peek_behind(batch)
                assert list(again[batch]) == list(behind)
                for name, values in step.replay.second.peek_behind(batch).items():
                    assert values.equal(behind[name]), name
                    found += 1
            step.seal()
    assert found >= 4 * 3
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


class Doubling:
    """Advances the second stream through layers whose outputs are doubled, and keeps what is before each."""

    def __init__(self) -> None:
        self.before: dict[int, list[torch.Tensor]] = {}
        self.recomputed: list[int] = []

    @contextmanager
    def doubled(self, step: LayerStep) -> Iterator[None]:
        def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return output * 2

        handle = step.module.register_forward_hook(double)
        yield
        handle.remove()

    def __call__(self, step: LayerStep) -> None:
        assert step.replay is not None
        self.before[step.layer] = [step.replay.second.peek(batch)[HIDDEN] for batch in range(3)]
        with self.doubled(step):
            step.replay.advance(step.module)

    def recompute(self, step: LayerStep) -> None:
        self.recomputed.append(step.layer)
        self(step)


def undisturbed(model: Path, run: Path) -> Doubling:
    doubling = Doubling()
    with open_forward(model, run, FILES, recompute=doubling.recompute) as forward:
        forward.start()
        for step in forward.steps():
            doubling(step)
    assert not doubling.before[1][0].equal(doubling.before[0][0])
    return doubling


@pytest.mark.parametrize(
    ("lost", "begins", "again"),
    [
        ([], 2, []),
        (["hidden/000002.raw"], 1, [1]),
        (["hidden-quantized/000002.raw"], 1, [1]),
        (["hidden/000002.json", "hidden-quantized/000002.json"], 1, [1]),
        (["hidden-quantized/000001.json", "hidden-quantized/000002.json"], 0, [0, 1]),
    ],
    ids=["nothing", "the first", "the second", "both records", "all of the second"],
)
def test_both_streams_go_on_from_the_same_layer(
    lost: list[str], begins: int, again: list[int], tmp_path: Path
) -> None:
    """Killed in layer 2, before which both have a boundary, and before layer 1 too."""
    model, run = save_tiny("gemma4", tmp_path / "model"), tmp_path / "run"
    expected = undisturbed(model, tmp_path / "other")
    stopped = Doubling()
    with pytest.raises(Stopped), open_forward(model, run, FILES, recompute=stopped.recompute) as forward:
        forward.start()
        for step in forward.steps():
            stopped(step)
            if step.layer == 2:
                raise Stopped("stopped")
            step.seal()
    for name in lost:
        (run / name).unlink()
    found = Doubling()
    with open_forward(model, run, FILES, recompute=found.recompute) as forward:
        assert forward.start(2) == begins
        for step in forward.steps(first=2):
            found(step)
    assert found.recomputed == again
    for layer in (2, 3):
        assert all(
            torch.equal(left, right)
            for left, right in zip(found.before[layer], expected.before[layer], strict=True)
        )
