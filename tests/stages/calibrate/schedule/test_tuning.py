"""Tuned rounding: what it changes, what it leaves, and that it is the same however often it is begun."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.calibrate.forward.replay import Replay
from stages.calibrate.run import calibrate
from stages.calibrate.schedule import tuning
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.calibrate.schedule.tuning import Tuned, tune
from stages.export.run import export
from stages.formats import NVFP4
from stages.formats.quantized import Quantized
from stages.progress import Silent
from stages.settings import ExportSettings
from stages.solve import rounding
from state.reader import open_run
from tests.stages.calibrate import runs
from tests.stages.calibrate.schedule.test_layerwise import arrays, make_inputs, solutions
from tests.stages.calibrate.schedule.test_quantized_stream import served
from tests.stages.calibrate.schedule.two_streams import looking

TUNED = "nvfp4_tuned"

settings = partial(runs.settings, samples=12, batch=5, schedule="layerwise", recipe=TUNED)


class Telling(Silent):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few steps, larger ones for that."""
    monkeypatch.setattr(rounding, "STEPS", 20)
    monkeypatch.setattr(rounding, "RATE", 0.02)
    yield


def untuned(inputs: Path, run: Path) -> dict[str, bytes]:
    """What tuning begins with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "STEPS", 0)
        calibrate(settings(inputs, run), Silent())
    return solutions(run)


def test_codes_change_and_scales_stay(inputs: Path, tmp_path: Path) -> None:
    """In the first layer; the second begins behind other weights."""
    before = untuned(inputs, tmp_path / "before")
    calibrate(settings(inputs, tmp_path / "after"), Silent())
    after = solutions(tmp_path / "after")
    assert before.keys() == after.keys()
    first = [name for name in before if name.startswith("0/")]
    assert len([name for name in first if name.endswith("@values")]) == 7
    for name in first:
        assert (before[name] == after[name]) == (not name.endswith("@values")), name


def test_the_layer_comes_nearer_to_what_it_was(inputs: Path, tmp_path: Path) -> None:
    """Measured as it is served, on the windows of the text alone."""
    with looking() as rounded, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "STEPS", 0)
        calibrate(settings(inputs, tmp_path / "before"), Silent())
    with looking() as tuned:
        calibrate(settings(inputs, tmp_path / "after"), Silent())

    def error(second: list[Tensor], first: list[Tensor]) -> float:
        pairs = zip(second[:3], first[:3], strict=True)
        return sum((a.float() - b.float()).pow(2).sum().item() for a, b in pairs)

    assert error(tuned.second[0], tuned.first[0]) < 0.9 * error(rounded.second[0], rounded.first[0])


def test_statistics_see_the_text_alone(inputs: Path, tmp_path: Path) -> None:
    """The windows that the solver is given besides change no amax and no count of tokens."""
    calibrate(settings(inputs, tmp_path / "max", recipe="nvfp4"), Silent())
    with looking() as looked:
        calibrate(settings(inputs, tmp_path / "run"), Silent())
    assert arrays(tmp_path / "run") == arrays(tmp_path / "max")
    assert sum(len(batch) for batch in looked.second[1]) == 12 + 11 + 12


def test_the_second_stream_is_what_the_exported_checkpoint_computes(inputs: Path, tmp_path: Path) -> None:
    with looking() as looked:
        calibrate(settings(inputs, tmp_path / "run"), Silent())
    report = export(ExportSettings(run=tmp_path / "run", out=tmp_path / "out", recipe=TUNED), Silent())
    assert report.solver is not None and report.solver.startswith("tune-")
    tokens = torch.from_numpy(open_run(tmp_path / "run").tokens.astype("int64"))
    expected = served(inputs / "model", tmp_path / "out", tokens.split(5), NVFP4)
    for layer in (0, 1):
        for ours, theirs in zip(looked.second[layer], expected[layer], strict=False):
            assert ours.equal(theirs), f"layer {layer}"


@pytest.mark.parametrize("move", [5, 33], ids="move {}".format)
def test_killed_while_tuning_it_ends_the_same(move: int, inputs: Path, tmp_path: Path) -> None:
    calibrate(settings(inputs, tmp_path / "whole"), Silent())
    moves = []

    def crashing(self: Any, *args: Any) -> None:
        if len(moves) == move:
            raise runs.Crash
        moves.append(args)
        moved(self, *args)

    moved = tuning._Tuning._move
    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Crash):
        patch.setattr(tuning._Tuning, "_move", crashing)
        calibrate(settings(inputs, tmp_path / "run"), Silent())
    calibrate(settings(inputs, tmp_path / "run"), Silent())
    assert solutions(tmp_path / "run") == solutions(tmp_path / "whole")
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")


def test_a_layer_without_a_gradient_keeps_gptq_and_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = untuned(inputs, tmp_path / "before")
    differentiable = Replay.differentiable

    def cut(self: Replay, batch: int, layer: Any) -> Tensor:
        found = differentiable(self, batch, layer)
        return found.detach() if self.layer == 0 else found

    monkeypatch.setattr(Replay, "differentiable", cut)
    telling = Telling()
    calibrate(settings(inputs, tmp_path / "run"), telling)
    after = solutions(tmp_path / "run")
    assert all(after[name] == values for name, values in before.items() if name.startswith("0/"))
    assert any(after[name] != values for name, values in before.items() if name.startswith("1/"))
    [warning] = [text for text in telling.warnings if "tuned" in text]
    assert warning.startswith("layer 0 is not tuned and keeps GPTQ's weights: element 0 of tensors does not")

    report = export(ExportSettings(run=tmp_path / "run", out=tmp_path / "out", recipe=TUNED), Silent())
    [use] = [use for use in report.policies if use.policy == "not-tuned"]
    assert len(use.quantizers) >= 7 and all(".layers.0." in name for name in use.quantizers)


def not_tuned(run: Path, out: Path) -> set[str]:
    """Modules that an export says are not tuned."""
    report = export(ExportSettings(run=run, out=out, recipe=TUNED), Silent())
    return {name for use in report.policies if use.policy == "not-tuned" for name in use.quantizers}


def test_a_gradient_that_is_not_finite_leaves_gptq(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sign comes of it: the layer would stay as it is, and nobody would know."""
    before = untuned(inputs, tmp_path / "before")
    differentiable = Replay.differentiable

    def spoilt(self: Replay, batch: int, layer: Any) -> Tensor:
        found = differentiable(self, batch, layer)
        return found * torch.nan if self.layer == 0 and batch == 1 else found

    monkeypatch.setattr(Replay, "differentiable", spoilt)
    telling = Telling()
    calibrate(settings(inputs, tmp_path / "run"), telling)
    after = solutions(tmp_path / "run")
    values = [name for name in before if name.startswith("0/") and name.endswith("@values")]
    assert values and all(after[name] == before[name] for name in values)
    assert "layer 0 is not tuned and keeps GPTQ's weights: its gradient is not finite" in telling.warnings
    assert all(".layers.0." in name for name in not_tuned(tmp_path / "run", tmp_path / "out"))


def test_a_layer_that_comes_no_nearer_keeps_gptq(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = untuned(inputs, tmp_path / "before")
    monkeypatch.setattr(rounding, "RATE", -0.05)  # away from it
    telling = Telling()
    calibrate(settings(inputs, tmp_path / "run"), telling)
    after = solutions(tmp_path / "run")
    values = [name for name in before if name.startswith("0/") and name.endswith("@values")]
    assert values and all(after[name] == before[name] for name in values)
    assert telling.warnings[0].startswith(
        "layer 0 is not tuned and keeps GPTQ's weights: its error went from "
    )
    assert len(not_tuned(tmp_path / "run", tmp_path / "out")) >= 14


def test_other_errors_are_no_lack_of_a_gradient(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that is free when a layer is tuned must not decide what is stored."""

    def full(self: Replay, batch: int, layer: Any) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Replay, "differentiable", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        calibrate(settings(inputs, tmp_path / "run"), Silent())


def test_a_matrix_that_the_output_does_not_depend_on_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an indexer, which chooses among tokens: here v, cut off where it is multiplied with."""
    replaced = LayerMatrices.replaced

    def cut(self: LayerMatrices, name: str, matrices: dict[str, Tensor]) -> Any:
        return replaced(self, name, {n: m.detach() if "v_proj" in n else m for n, m in matrices.items()})

    monkeypatch.setattr(LayerMatrices, "replaced", cut)
    telling = Telling()
    calibrate(settings(inputs, tmp_path / "run"), telling)
    names = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    assert [text.partition(" keep")[0] for text in telling.warnings] == [
        f"of layer {layer}, {name}" for layer, name in enumerate(names)
    ]
    assert not_tuned(tmp_path / "run", tmp_path / "out") == set(names)


def test_experts_that_no_token_reached_keep_gptq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path, "qwen3_moe")
    given: dict[str, Quantized] = {}
    found: dict[str, Quantized] = {}

    def keeping(step: Any, stream: Any, solved: Any) -> Tuned:
        before = {name: quantized for name, (quantized, _) in solved.items()}
        tuned = tune(step, stream, solved)
        assert not solved
        if step.layer == 0:
            given.update(before)
            found.update(tuned.found)
        return tuned

    monkeypatch.setattr("stages.calibrate.schedule.solving.tune", keeping)
    monkeypatch.setattr(rounding, "RATE", 0.01)
    with looking() as looked:
        calibrate(settings(tmp_path, tmp_path / "run", samples=1, seq=2), Silent())
    [reached] = {
        tuple(total.flatten(1).any(1).tolist())
        for key, total in looked.moments[0].items()
        if total.dim() == 3 and "down_proj" in key
    }
    assert set(reached) == {True, False}
    name = next(name for name in given if name.endswith("down_proj"))
    for expert, was in enumerate(reached):
        assert found[name].values[expert].equal(given[name].values[expert]) == (not was), expert
