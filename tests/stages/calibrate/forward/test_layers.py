import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from stages.calibrate.forward import arguments, layers
from stages.calibrate.forward.buffers import Limits
from stages.calibrate.forward.layers import LayerwiseForward
from stages.model.decoder import LayerwiseUnsupported
from stages.model.skeleton import Skeleton, load_config
from state.errors import Stopped
from state.source import Source
from tests.stages.calibrate.families import FAMILIES, save_tiny

MEMORY = Limits(device=0, host=1 << 40)
FILES = Limits(device=0, host=0)
# Three batches, the last of another shape.
TOKENS = torch.randint(3, 96, (5, 24), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
BATCH = 2


def open_forward(
    model: Path, run: Path, limits: Limits = MEMORY, batch: int = BATCH, head=None, **options
) -> LayerwiseForward:
    """head: called with the output head's inputs."""
    source = Source.open(model)
    skeleton = Skeleton(load_config(model), source.tensors)

    @contextmanager
    def watched() -> Iterator[None]:
        module = skeleton.model.get_output_embeddings()
        handle = module.register_forward_pre_hook(lambda module, args: head(args[0]))
        yield
        handle.remove()

    if head is not None:
        options["outside"] = watched
    return LayerwiseForward(skeleton, source, TOKENS, batch, torch.device("cpu"), run, limits, **options)


class Outputs:
    """What every layer gave for every batch, by layer; `observe` collects it under either schedule."""

    def __init__(self) -> None:
        self.of: dict[int, list[torch.Tensor]] = {}

    @contextmanager
    def observe(self, layer: int, module: nn.Module) -> Iterator[None]:
        found = self.of.setdefault(layer, [])
        handle = module.register_forward_hook(
            lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        yield
        handle.remove()


def whole_model(folder: Path, layers: str) -> tuple[Outputs, list[torch.Tensor]]:
    """Every layer's outputs, and the output head's inputs, with the whole model in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    outputs, heads = Outputs(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    observed = [outputs.observe(layer, module) for layer, module in enumerate(model.get_submodule(layers))]
    for context in observed:
        context.__enter__()
    with torch.inference_mode():
        for batch in TOKENS.split(BATCH):
            model(input_ids=batch.long(), use_cache=False)
    return outputs, heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_head_are_bit_equal_to_the_whole_model(family, dtype, tmp_path):
    folder = save_tiny(family, tmp_path / "model", dtype)
    found, heads = Outputs(), []
    with open_forward(folder, tmp_path / "run", head=heads.append) as forward:
        assert forward.start() == 0
        assert [step.layer for step in forward.steps(found.observe)] == [0, 1, 2, 3]
        expected, expected_heads = whole_model(folder, forward.decoder.path)
    for layer in range(4):
        for batch, (left, right) in enumerate(zip(found.of[layer], expected.of[layer], strict=True)):
            assert torch.equal(left, right), f"layer {layer}, batch {batch}"
    assert all(torch.equal(left, right) for left, right in zip(heads, expected_heads, strict=True))


def heads_of(model: Path, run: Path) -> list[torch.Tensor]:
    heads: list[torch.Tensor] = []
    with open_forward(model, run, head=heads.append) as forward:
        forward.start()
        for _ in forward.steps():
            pass
    return heads


def stop_behind_layer_1(model: Path, run: Path) -> None:
    """Commit layers 0 and 1, stop in layer 2."""
    with pytest.raises(Stopped), open_forward(model, run, FILES) as forward:
        forward.start()
        for step in forward.steps():
            if step.layer == 2:
                raise Stopped("stopped")
            step.seal()


@pytest.mark.parametrize("family", ["llama", "gemma4", "gemma3n", "glm_moe_dsa"])
def test_goes_on_from_the_boundary_of_a_stopped_run(family, tmp_path):
    """Layers 2 and 3 of these Gemmas attend to keys and values of layers 0 and 1: they come with the
    boundary."""
    model = save_tiny(family, tmp_path / "model")
    stop_behind_layer_1(model, tmp_path / "run")
    found: list[torch.Tensor] = []
    with open_forward(model, tmp_path / "run", FILES, head=found.append) as forward:
        assert forward.start(2) == 2
        assert [step.layer for step in forward.steps()] == [2, 3]
    expected = heads_of(model, tmp_path / "other")
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_goes_on_one_layer_before_when_the_boundary_is_damaged(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    stop_behind_layer_1(model, tmp_path / "run")
    path = tmp_path / "run" / "hidden" / "000002.raw"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with open_forward(model, tmp_path / "run", FILES) as forward:
        assert forward.start(2) == 1
        assert not path.exists()
        assert [step.layer for step in forward.steps(first=2)] == [2, 3]


def test_recomputes_committed_layers_without_observing_them(tmp_path):
    model = save_tiny("gemma4", tmp_path / "model")
    found, heads = Outputs(), []
    with open_forward(model, tmp_path / "run", head=heads.append) as forward:
        forward.start()
        assert [step.layer for step in forward.steps(found.observe, first=2)] == [2, 3]
    assert sorted(found.of) == [2, 3]
    expected = heads_of(model, tmp_path / "other")
    assert all(torch.equal(left, right) for left, right in zip(heads, expected, strict=True))


def test_only_one_layer_has_weights_at_a_time(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "model")
    with open_forward(model, tmp_path / "run") as forward:
        forward.start()
        for step in forward.steps():
            loaded = {
                name for name, parameter in forward.decoder.model.named_parameters() if not parameter.is_meta
            }
            assert loaded == {f"{step.name}.{name}" for name, _ in step.module.named_parameters()}
        assert all(parameter.is_meta for parameter in forward.decoder.model.parameters())


def computes_an_argument_from_hidden_states(self, input_ids, **_):
    hidden = self.embed_tokens(input_ids)
    cos, sin = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for layer in self.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos * hidden.mean(), sin))
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@pytest.mark.parametrize("batch", [5, 2], ids=["one batch", "three batches"])
def test_arguments_computed_from_hidden_states_are_refused(batch, tmp_path, monkeypatch):
    """Nothing is yielded before."""
    model = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(LlamaModel, "forward", computes_an_argument_from_hidden_states)
    with open_forward(model, tmp_path / "run", batch=batch) as forward:
        forward.start()
        with pytest.raises(LayerwiseUnsupported, match=r"computes arguments of .* from hidden states"):
            next(forward.steps())


@pytest.mark.parametrize(("family", "times"), [("llama", 0), ("gemma4", 1)])
def test_a_second_batch_of_equal_arguments_shows_that_they_are_independent(
    family, times, tmp_path, monkeypatch
):
    """Gemma 4 computes arguments from tokens: the first batch is captured once more."""
    model = save_tiny(family, tmp_path / "model")
    altered, looked_at = [], []

    def watched(*args, **options):
        altered.append(options["altered"])
        return arguments.capture_arguments(*args, **options)

    monkeypatch.setattr(layers, "capture_arguments", watched)
    monkeypatch.setattr(layers, "require_independence", lambda *args: looked_at.append(args))
    with open_forward(model, tmp_path / "run") as forward:
        forward.start()
        next(forward.steps())
    assert altered == [True, False]
    assert len(looked_at) == times


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4"])
def test_hidden_states_do_not_wait_for_the_garbage_collector(family, tmp_path):
    """A reference cycle would keep them until it comes by."""
    model = save_tiny(family, tmp_path / "model")
    seen: list[weakref.ref] = []

    @contextmanager
    def observe(layer: int, module: nn.Module) -> Iterator[None]:
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
        yield
        handle.remove()

    gc.disable()
    try:
        with open_forward(model, tmp_path / "run") as forward:
            forward.start()
            for step in forward.steps(observe):
                assert [state() for state in seen] == [None] * 3 * (step.layer + 1)
    finally:
        gc.enable()


def test_tells_of_every_batch(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    seen = []
    with open_forward(
        model, tmp_path / "run", advance=lambda layer, batch: seen.append((layer, batch))
    ) as forward:
        forward.start()
        for _ in forward.steps():
            pass
    assert seen == [(layer, batch) for layer in range(4) for batch in range(3)]
