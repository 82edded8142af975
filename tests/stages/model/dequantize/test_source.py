"""A quantized folder as a source: plain tensors under plain names, digests of what the files hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages.model.dequantize.source import DequantizedSource, open_source, told_of_quantized
from stages.model.matrices import StoredMatrix
from stages.model.raw import raw_bytes
from stages.model.weights import map_tensor, read_tensor
from state.errors import IdentityMismatch, InputError
from state.source import Source
from tests.stages.model.changing import overwrite

ONES = torch.tensor([[1.0, -0.5], [2.0, 1.5]])


def folder(path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def quantized(path: Path, config: dict[str, Any] | None = None) -> Path:
    return folder(
        path,
        config,
        up__weight=ONES.to(torch.float8_e4m3fn),
        up__weight_scale=torch.tensor(4.0),
        up__input_scale=torch.tensor(1.0),
        norm__weight=torch.ones(2, dtype=torch.bfloat16),
    )


def test_a_plain_folder_is_its_own_source(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, a__weight=ONES))
    assert type(source) is Source and source.quantized == {} and told_of_quantized(source) == []
    assert source.stored is source.tensors and source.made_from("a.weight") == ("a.weight",)


def test_plain_tensors_are_presented(tmp_path: Path) -> None:
    source = open_source(quantized(tmp_path))
    assert isinstance(source, DequantizedSource)
    assert list(source.tensors) == ["norm.weight", "up.weight"]
    entry = source.tensors["up.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("BF16", (2, 2), 8)
    assert read_tensor(source, "up.weight").equal(ONES.bfloat16() * 4)
    assert StoredMatrix("up.weight", first=1).read(source).tolist() == [[8.0, 6.0]]
    assert bytes(source.read("up.weight")) == bytes(source.private("up.weight"))
    assert read_tensor(source, "norm.weight").tolist() == [1.0, 1.0]
    assert source.quantized == {"up.weight": "FP8 per tensor"}
    assert told_of_quantized(source) == [
        f"{tmp_path} is quantized (FP8 per tensor: 1 weights) and is dequantized while it is read",
        "left out, since they go with the quantized weights: 1 input_scale",
    ]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "F32"),
        ({"torch_dtype": "float16"}, "F16"),
        ({"text_config": {"dtype": "float16"}}, "F16"),
        ({}, "BF16"),
    ],
)
def test_the_dtype_is_the_models(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    assert open_source(quantized(tmp_path, config)).tensors["up.weight"].dtype == dtype


def test_digests_are_of_the_files(tmp_path: Path) -> None:
    source, held = open_source(quantized(tmp_path)), Source.open(tmp_path)
    assert source.digests(threads=1) == held.digests(threads=1)
    assert source.digest("up.weight_scale") == held.digest("up.weight_scale")
    assert source.made_from("up.weight") == ("up.weight", "up.weight_scale")
    assert source.stored.keys() == held.tensors.keys()


def test_a_scale_that_changes_after_it_was_digested_is_noticed(tmp_path: Path) -> None:
    source = open_source(quantized(tmp_path))
    source.digests(threads=1)
    read_tensor(source, "up.weight")
    start = source.stored["up.weight_scale"].start
    overwrite(tmp_path / "model.safetensors", start, raw_bytes(torch.tensor(8.0)).tobytes())
    with pytest.raises(IdentityMismatch, match=r"tensors\.up\.weight_scale: "):
        read_tensor(source, "up.weight")
    with pytest.raises(IdentityMismatch):
        source.require_unchanged()


def test_one_expert_is_made_of_its_own_codes(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (3, 4, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (3, 4, 2), dtype=torch.uint8)
    source = open_source(folder(tmp_path, e__up_blocks=blocks, e__up_scales=scales))
    whole = map_tensor(source, "e.up")
    assert tuple(whole.shape) == source.tensors["e.up"].shape == (3, 64, 4)
    assert map_tensor(source, "e.up", 2).equal(whole[2])
    matrix = StoredMatrix("e.up", expert=2, transposed=True, first=1, stride=2)
    assert matrix.shape(source.tensors) == (2, 64)
    assert matrix.read(source).equal(whole[2].mT[1::2])

    assert len(source.private("e.up", 2)) == 2 * 64 * 4


def test_integers_that_are_no_shape(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        a__weight_packed=torch.zeros(2, 2, dtype=torch.int32),
        a__weight_scale=torch.ones(2, 1),
        a__weight_shape=torch.tensor([2.0, 16.0]),
    )
    with pytest.raises(InputError, match=r"a\.weight_shape is no shape"):
        open_source(path)
