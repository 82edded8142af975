"""Two streams: statistics of the model as it is, solutions behind what will be served."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.dequantize import weight_of
from stages.calibrate.observe.rounded import Rounding, rounded_inputs
from stages.calibrate.run import calibrate
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.export.run import export
from stages.formats import FP8, INT8_SQ, NVFP4, TABLE, WeightFormat
from stages.model.skeleton import Skeleton, load_config
from stages.progress import Silent
from stages.recipe.solvers import Solver
from stages.settings import ExportSettings
from state.names import split_name
from state.reader import open_run
from state.source import Source
from tests.stages.calibrate import families, runs
from tests.stages.calibrate.schedule.test_layerwise import GPTQ, arrays, make_inputs, solutions
from tests.stages.calibrate.schedule.two_streams import looking
from tests.stages.export import support
from tests.stages.export.support import quiet
from tests.stages.export.test_solutions import write_recipe
from tests.stages.formats.test_toy import RECIPE as WEIGHTS_ALONE
from tests.stages.formats.toy import TOY

FORMATS: dict[str, WeightFormat] = {"nvfp4": NVFP4, "fp8": FP8, "int8_per_channel": INT8_SQ}
INPUT_OF = {"nvfp4": "nvfp4", "fp8": "fp8", "int8_per_channel": "int8"}

settings = partial(runs.settings, samples=12, batch=5, schedule="layerwise")


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp(request.param), request.param)


def test_statistics_are_those_of_the_model_as_it_is(inputs: Path, tmp_path: Path) -> None:
    """Bit for bit those of a run without a solver: nothing in them comes from the second stream."""
    calibrate(settings(inputs, tmp_path / "max", recipe="nvfp4"), Silent())
    with looking() as looked:
        calibrate(settings(inputs, tmp_path / "gptq", recipe=GPTQ), Silent())
    assert arrays(tmp_path / "gptq") == arrays(tmp_path / "max")
    assert looked.second.keys() == looked.moments.keys() == {0, 1}
    for layer in (0, 1):
        for first, second in zip(looked.first[layer], looked.second[layer], strict=True):
            assert first.shape == second.shape and first.isfinite().all() and second.isfinite().all()
            assert not first.equal(second)


@pytest.mark.parametrize("inputs_rounded", [True, False], ids=["inputs rounded", "weights alone"])
def test_solutions_are_made_behind_quantized_layers(
    inputs_rounded: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other than those made of the model as it is; in the first layer only where inputs are rounded."""
    monkeypatch.setitem(TABLE, TOY.name, TOY)
    (tmp_path / "weights.yaml").write_text(WEIGHTS_ALONE)
    recipe = GPTQ if inputs_rounded else str(tmp_path / "weights.yaml")
    calibrate(settings(inputs, tmp_path / "two", recipe=recipe), Silent())
    monkeypatch.setattr(Solver, "two_streams", property(lambda self: False))
    calibrate(settings(inputs, tmp_path / "one", recipe=recipe), Silent())
    two, one = solutions(tmp_path / "two"), solutions(tmp_path / "one")
    values = [name for name in two if name.endswith("@values")]
    assert two.keys() == one.keys() and len(values) >= 14
    for name in values:
        same = name.startswith("0/") and not inputs_rounded
        assert (two[name] == one[name]) == same, name


def served(model: Path, out: Path, batches: tuple[Tensor, ...], format: WeightFormat) -> list[list[Tensor]]:
    """What an engine makes of an exported checkpoint: layer → hidden states behind it, batch by batch."""
    skeleton = Skeleton(load_config(model), Source.open(model).tensors)
    with quiet():
        skeleton.model = AutoModelForCausalLM.from_pretrained(model).eval()
    stored = load_file(out / "model.safetensors")
    modules = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    roundings: dict[str, Rounding] = {name: (format, stored[f"{name}.input_scale"]) for name in modules}
    found: list[list[Tensor]] = []
    layers = skeleton.model.model.layers
    for number, layer in enumerate(layers):
        matrices = LayerMatrices(skeleton, modules, number)
        found.append([])
        layer.register_forward_hook(lambda module, args, output, kept=found[-1]: kept.append(output))
        stacked = {
            name: torch.stack([weight_of(stored, one) for one in members(modules, module)])
            for name, (module, _) in matrices.read().items()
        }
        with torch.no_grad():
            for name, values in matrices.parameters(stacked).items():
                skeleton.model.get_parameter(name).copy_(values)
    with torch.inference_mode(), ExitStack() as stack:
        for number in range(len(layers)):
            stack.enter_context(rounded_inputs(skeleton, skeleton.model, f"model.layers.{number}", roundings))
        for batch in batches:
            skeleton.model(input_ids=batch, use_cache=False)
    return found


def members(modules: list[str], first: str) -> list[str]:
    """A module, or all experts of the projection that it is of, in order."""
    pattern, layer, expert = split_name(first)
    own = {split_name(name)[2]: name for name in modules if split_name(name)[:2] == (pattern, layer)}
    return [own[number] for number in sorted(own, key=lambda number: number or 0)] if expert == 0 else [first]


@pytest.mark.parametrize("name", FORMATS)
def test_the_second_stream_is_what_the_exported_checkpoint_computes(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    """Bit for bit: the weights read from the checkpoint, inputs rounded under the scales that lie in it."""
    compare_with_the_checkpoint(inputs, tmp_path, name)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "gemma4_moe", "qwen3_next"])
def test_other_families_too(family: str, tmp_path: Path) -> None:
    """MLA, shared experts, experts beside a dense part, linear attention."""
    config = families.tiny_config(family)
    config.vocab_size = support.SIZES["vocab_size"]
    for name in ("q_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(config, name, None) == 24:
            setattr(config, name, 32)  # whole blocks
    support.make_model(tmp_path / "model", config)
    support.make_text(tmp_path / "text.jsonl")
    compare_with_the_checkpoint(tmp_path, tmp_path, "nvfp4")


def compare_with_the_checkpoint(inputs: Path, folder: Path, name: str) -> None:
    recipe = write_recipe(folder / "recipe.yaml", "gptq", name, INPUT_OF[name])
    with looking() as looked:
        calibrate(settings(inputs, folder / "run", recipe=recipe), Silent())
    export(ExportSettings(run=folder / "run", out=folder / "out"), Silent())
    tokens = torch.from_numpy(open_run(folder / "run").tokens.astype("int64"))
    expected = served(inputs / "model", folder / "out", tokens.split(5), FORMATS[name])
    assert looked.second.keys() == set(range(len(expected)))
    for layer, states in looked.second.items():
        assert len(expected[layer]) == len(states) == 3
        for ours, theirs in zip(states, expected[layer], strict=True):
            assert ours.equal(theirs), f"layer {layer}"


def test_the_first_stream_is_what_the_model_computes(inputs: Path, tmp_path: Path) -> None:
    with looking() as looked:
        calibrate(settings(inputs, tmp_path / "run", recipe=GPTQ), Silent())
    tokens = torch.from_numpy(open_run(tmp_path / "run").tokens.astype("int64"))
    with quiet(), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
        behind_first = [
            model(input_ids=batch, use_cache=False, output_hidden_states=True).hidden_states[1]
            for batch in tokens.split(5)
        ]
    assert all(a.equal(b) for a, b in zip(looked.first[0], behind_first, strict=True))


def test_a_layer_gone_through_again_gives_the_same_stream(inputs: Path, tmp_path: Path) -> None:
    """With its stored solution, where a second process begins behind it."""
    with looking() as whole:
        calibrate(settings(inputs, tmp_path / "whole", recipe=GPTQ), Silent())
    with pytest.raises(runs.Crash):
        calibrate(settings(inputs, tmp_path / "run", recipe=GPTQ), runs.Interrupting(5, runs.crash))
    with looking() as second:
        calibrate(settings(inputs, tmp_path / "run", recipe=GPTQ), Silent())
    assert second.moments.keys() == {1} and second.second.keys() == {0, 1}
    for layer in (0, 1):
        assert all(a.equal(b) for a, b in zip(whole.second[layer], second.second[layer], strict=True))
    assert all(second.moments[1][key].equal(total) for key, total in whole.moments[1].items())
