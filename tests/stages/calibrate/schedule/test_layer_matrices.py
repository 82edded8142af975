"""The matrices of a loaded layer: those of the checkpoint, and a layer with others in their place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.forward.layers import LayerwiseForward
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.model.skeleton import Skeleton, load_config
from state.names import split_name
from state.source import Source
from tests.families.newest import minimax_m3
from tests.families.write import write_family
from tests.stages.calibrate import linear_moe
from tests.stages.calibrate.families import save_tiny
from tests.stages.calibrate.forward.test_layers import BATCH, MEMORY, TOKENS
from tests.stages.export import support

Tensors = dict[str, Tensor]


def save(family: str, folder: Path) -> Path:
    if family == "minimax_m3":
        write_family(minimax_m3(), folder)
        return folder
    if family == "linear_moe":
        linear_moe.register()
        config = linear_moe.LinearMoeConfig(
            architectures=["LinearMoeForCausalLM"], **support.SIZES, **support.EXPERTS
        )
        return support.make_model(folder, config)
    return save_tiny(family, folder)


def advance(step: LayerStep) -> None:
    assert step.replay is not None
    step.replay.advance(step.module)


@contextmanager
def loaded(family: str, layer: int, folder: Path) -> Iterator[tuple[LayerMatrices, LayerStep, Tensors]]:
    """A layer's matrices, the layer with its weights, and the tensors of the checkpoint."""
    model = save(family, folder / "model")
    source = Source.open(model)
    skeleton = Skeleton(load_config(model), source.tensors)
    cpu = torch.device("cpu")
    with LayerwiseForward(
        skeleton, source, TOKENS, BATCH, cpu, folder / "run", MEMORY, recompute=advance
    ) as forward:
        forward.start()
        for step in forward.steps():
            if step.layer == layer:
                quantized = [
                    name
                    for name in skeleton.projections()
                    if "vision" not in name and not name.endswith(".gate")
                ]
                tensors = load_file(model / "model.safetensors")
                yield LayerMatrices(skeleton, quantized, layer), step, tensors
            advance(step)


def of_experts(tensors: Tensors, experts: str, leaf: str, count: int) -> Tensor:
    return torch.stack([tensors[f"{experts}.{number}.{leaf}.weight"] for number in range(count)])


LAYERS: dict[str, tuple[int, str, Callable[[Tensors], Tensor]]] = {
    "llama": (
        1,
        "model.layers.1.self_attn.k_proj",
        lambda of: of["model.layers.1.self_attn.k_proj.weight"][None],
    ),
    "qwen3_moe": (
        2,
        "model.layers.2.mlp.experts.E.up_proj",
        lambda of: of_experts(of, "model.layers.2.mlp.experts", "up_proj", 6),
    ),
    "linear_moe": (
        1,
        "model.layers.1.mlp.experts.E.down_proj",
        lambda of: of_experts(of, "model.layers.1.mlp.experts", "down_proj", 4),
    ),
    "nemotron_h": (
        1,
        "backbone.layers.1.mixer.experts.E.up_proj",
        lambda of: of_experts(of, "backbone.layers.1.mixer.experts", "up_proj", 6),
    ),
    "gpt_oss": (  # transposed, gate and up in turns
        1,
        "model.layers.1.mlp.experts.E.up_proj",
        lambda of: of["model.layers.1.mlp.experts.gate_up_proj"][:, :, 1::2].mT,
    ),
    "llama4": (  # transposed, one after the other
        1,
        "model.layers.1.feed_forward.experts.E.up_proj",
        lambda of: of["model.layers.1.feed_forward.experts.gate_up_proj"].chunk(2, -1)[1].mT,
    ),
    "minimax_m3": (  # gate and up merged in one linear
        0,
        "language_model.model.layers.0.mlp.up_proj",
        lambda of: of["language_model.model.layers.0.mlp.up_proj.weight"][None],
    ),
}
families = pytest.mark.parametrize("family", LAYERS)


@families
def test_what_is_read_is_what_the_checkpoint_holds(family: str, tmp_path: Path) -> None:
    layer, name, truth = LAYERS[family]
    with loaded(family, layer, tmp_path) as (matrices, _, tensors):
        hub, weights = matrices.read()[name]
        assert weights.dim() == 3 and weights.equal(truth(tensors))
        assert hub == (name.replace(".E.", ".0.") if ".E." in name else name)
        assert all(split_name(module)[1] == layer for module, _ in matrices.read().values())


@families
def test_parameters_of_the_same_matrices_are_those_that_are_loaded(family: str, tmp_path: Path) -> None:
    with loaded(family, LAYERS[family][0], tmp_path) as (matrices, step, _):
        same = {name: weights.float() for name, (_, weights) in matrices.read().items()}
        found = matrices.parameters(same)
        own = dict(matrices.model.named_parameters())
        assert all(
            values.equal(own[name]) and values.dtype == own[name].dtype for name, values in found.items()
        )
        assert all(name.startswith(f"{step.name}.") for name in found)
        assert matrices.parameters({}) == {}


@families
def test_one_matrix_at_a_time_is_replaced_and_its_gradient_is_its_own(family: str, tmp_path: Path) -> None:
    """The layer with it put in by hand has that one, and all others as they were."""
    with loaded(family, LAYERS[family][0], tmp_path) as (matrices, _, _):
        before = {name: weights.detach().clone() for name, (_, weights) in matrices.read().items()}
        for changed in before:
            other = (before[changed].float() * 2).requires_grad_()
            found = matrices.parameters({changed: other})
            assert len(found) == 1 or ".E." in changed
            own = dict(matrices.model.named_parameters())
            kept = {name: own[name].detach().clone() for name in found}
            with torch.no_grad():
                for name, values in found.items():
                    own[name].copy_(values)
                for name, (_, weights) in matrices.read().items():
                    assert weights.equal(before[name] * 2 if name == changed else before[name]), name
                for name, values in kept.items():
                    own[name].copy_(values)
            sum(values.float().sum() for values in found.values()).backward()
            assert other.grad is not None and other.grad.equal(torch.ones_like(other))


@families
def test_the_replaced_layer_computes_with_other_matrices_and_stays(family: str, tmp_path: Path) -> None:
    with loaded(family, LAYERS[family][0], tmp_path) as (matrices, step, _):
        assert step.replay is not None
        before = {name: weights.detach().clone() for name, (_, weights) in matrices.read().items()}
        others = {name: weights.float() * 1.5 for name, weights in before.items()}
        with torch.inference_mode():
            plain = step.replay.run(0, step.module)["hidden"]
            same = step.replay.run(0, matrices.replaced(step.name, before))["hidden"]
            found = step.replay.run(0, matrices.replaced(step.name, others))["hidden"]
            again = step.replay.run(0, step.module)["hidden"]
            own = dict(matrices.model.named_parameters())
            for name, values in matrices.parameters(others).items():
                own[name].copy_(values)
            expected = step.replay.run(0, step.module)["hidden"]
        assert same.equal(plain) and again.equal(plain)
        assert found.equal(expected) and not found.equal(plain)


def test_a_layer_without_replaced_matrices_is_itself(tmp_path: Path) -> None:
    with loaded("llama", 0, tmp_path) as (matrices, step, _):
        hidden = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
        kwargs = {"position_embeddings": (torch.ones(1, 1, 16).bfloat16(), torch.zeros(1, 1, 16).bfloat16())}
        assert matrices.replaced(step.name, {})(hidden, **kwargs).equal(
            functional_call(step.module, {}, (hidden,), kwargs)
        )


def test_what_the_recipe_leaves_out_is_not_read(tmp_path: Path) -> None:
    with loaded("qwen3_moe", 1, tmp_path) as (matrices, _, _):
        names = set(matrices.read())
        down = [f"model.layers.1.mlp.experts.{number}.down_proj" for number in range(6)]
        assert len(names) == 4 + 3
        matrices._quantized = down  # of this layer's experts alone
        assert {name for name in matrices.read() if ".E." in name} == {
            "model.layers.1.mlp.experts.E.down_proj"
        }
