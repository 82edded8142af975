from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.calibrate.forward.layer_weights import OUTSIDE, Weights, materialise_buffers
from stages.model.decoder import LayerwiseUnsupported, find_decoder
from stages.model.skeleton import Skeleton, load_config
from state.errors import IdentityMismatch
from state.source import Source
from tests.stages.calibrate.families import save_tiny
from tests.stages.model.changing import overwrite

CPU = torch.device("cpu")


def open_weights(folder: Path) -> tuple[Skeleton, Weights]:
    source = Source.open(folder)
    skeleton = Skeleton(load_config(folder), source.tensors)
    return skeleton, Weights(find_decoder(skeleton.model), skeleton.parameter_of, source, CPU)


def change(folder: Path, edit: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a checkpoint, or remove those given as None."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **edit}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"}
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h", "gemma4"])
def test_a_layer_gets_the_weights_that_from_pretrained_gives_it(family, tmp_path):
    folder = save_tiny(family, tmp_path)
    skeleton, weights = open_weights(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights.load(1, weights.read(1))
    found = {name: value for name, value in skeleton.model.state_dict().items() if not value.is_meta}
    expected = {
        name: value for name, value in whole.state_dict().items() if name.startswith("model.layers.1.")
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    weights.free(1)
    assert all(value.is_meta for value in skeleton.model.state_dict().values())


def test_a_router_bias_declared_float32_is_loaded_as_such(tmp_path):
    skeleton, weights = open_weights(save_tiny("deepseek_v3", tmp_path))
    weights.load(1, weights.read(1))
    layer = skeleton.model.model.layers[1]
    assert layer.mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert layer.mlp.experts.down_proj.dtype == torch.bfloat16


def test_everything_outside_the_layers_but_the_head(tmp_path):
    skeleton, weights = open_weights(save_tiny("llama", tmp_path))
    weights.load(OUTSIDE, weights.read(OUTSIDE))
    loaded = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    assert loaded == {"model.embed_tokens.weight", "model.norm.weight"}


def test_bytes_of_a_part(tmp_path):
    _, weights = open_weights(save_tiny("llama", tmp_path))
    # q 64x32, k and v 32x32, o 32x64, gate and up 48x32, down 32x48, two norms of 32; two bytes each.
    assert weights.nbytes(0) == 2 * (2048 + 1024 + 1024 + 2048 + 3 * 1536 + 64)


@pytest.mark.parametrize("family", ["gemma3", "gemma3n", "gemma4", "llama", "nemotron_h"])
def test_buffers_are_those_of_from_pretrained(family, tmp_path):
    folder = save_tiny(family, tmp_path)
    skeleton, _ = open_weights(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    materialise_buffers(skeleton.model, CPU)
    found = dict(skeleton.model.named_non_persistent_buffers())
    for name, expected in whole.named_non_persistent_buffers():
        assert found[name].dtype == expected.dtype, name
        assert torch.equal(found[name], expected), name


def test_a_weight_without_a_hub_tensor_is_named_before_any_layer_is_loaded(tmp_path):
    folder = save_tiny("llama", tmp_path)
    change(folder, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(
        LayerwiseUnsupported,
        match=r"no hub tensor fills model\.layers\.1\.mlp\.up_proj\.weight.*--schedule whole",
    ):
        open_weights(folder)


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    folder = save_tiny("llama", tmp_path)
    change(folder, {"model.layers.1.mlp.up_proj.weight": torch.zeros(47, 32, dtype=torch.bfloat16)})
    _, weights = open_weights(folder)
    with pytest.raises(LayerwiseUnsupported, match=r"can't convert .*model\.layers\.1\.mlp\.up_proj\.weight"):
        weights.load(1, weights.read(1))


def test_a_conversion_that_fails_is_named(tmp_path):
    folder = save_tiny("mixtral", tmp_path)
    change(
        folder,
        {"model.layers.1.block_sparse_moe.experts.2.w1.weight": torch.zeros(47, 32, dtype=torch.bfloat16)},
    )
    _, weights = open_weights(folder)
    with pytest.raises(
        LayerwiseUnsupported, match=r"can't convert .*model\.layers\.1\.mlp\.experts\.gate_up_proj"
    ):
        weights.load(1, weights.read(1))


def test_a_layer_is_read_as_it_was_digested_or_not_at_all(tmp_path):
    folder = save_tiny("llama", tmp_path)
    source = Source.open(folder)
    source.digests(threads=1)
    skeleton = Skeleton(load_config(folder), source.tensors)
    weights = Weights(find_decoder(skeleton.model), skeleton.parameter_of, source, CPU)
    weights.read(0)
    overwrite(
        folder / "model.safetensors", source.tensors["model.layers.1.mlp.up_proj.weight"].start, b"\x80"
    )
    weights.read(0)
    with pytest.raises(IdentityMismatch, match=r"tensors\.model\.layers\.1\.mlp\.up_proj\.weight: stored"):
        weights.read(1)


def test_writing_to_a_loaded_weight_leaves_the_checkpoint_alone(tmp_path):
    folder = save_tiny("llama", tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    skeleton, weights = open_weights(folder)
    weights.load(1, weights.read(1))
    with torch.no_grad():
        skeleton.model.model.layers[1].mlp.up_proj.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
