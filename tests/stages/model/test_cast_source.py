"""A folder in another dtype as a source: cast tensors, digests of what the files hold, configurations that
say so.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages.model.cast_source import (
    CastSource,
    dtype_asked,
    require_held_by_dtype,
    told_of_cast,
    with_dtype,
)
from stages.model.dequantize.source import open_source
from stages.model.matrices import StoredMatrix
from stages.model.raw import raw_bytes
from stages.model.skeleton import load_config
from stages.model.weights import map_tensor, read_tensor
from state.errors import IdentityMismatch, InputError
from state.source import Source
from tests.stages.model.changing import overwrite

HALF = torch.tensor([[1.0, 1.0009765625], [0.5, 3.0]]).half()  # the second is between two of bfloat16
FINE = torch.tensor([1.0009765625])


def folder(path: Path, config: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    tensors = {"a.weight": HALF, "experts": torch.stack([HALF, HALF * 2]), "bias": FINE, "ids": torch.ones(1)}
    save_file({**tensors, "ids": torch.ones(3, dtype=torch.int64), **more}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {"dtype": "float16"}))
    return path


def test_its_own_dtype_changes_nothing(tmp_path: Path) -> None:
    path = folder(tmp_path)
    for asked in ("auto", "float16"):
        source = open_source(path, asked)
        assert type(source) is Source and dtype_asked(source) is None and told_of_cast(source) == []


def test_floats_are_rounded_and_what_was_kept_wide_stays(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path), "bfloat16")
    assert isinstance(source, CastSource) and dtype_asked(source) == "bfloat16"
    assert {name: entry.dtype for name, entry in source.tensors.items()} == {
        "a.weight": "BF16", "bias": "F32", "experts": "BF16", "ids": "I64",
    }  # fmt: skip
    assert read_tensor(source, "a.weight").tolist() == [[1.0, 1.0], [0.5, 3.0]]
    assert read_tensor(source, "bias").equal(FINE)
    assert map_tensor(source, "experts", 1).tolist() == [[2.0, 2.0], [1.0, 6.0]]
    assert StoredMatrix("experts", expert=1, first=1).read(source).tolist() == [[1.0, 6.0]]
    assert bytes(source.read("a.weight")) == bytes(source.private("a.weight"))
    assert told_of_cast(source) == [
        f"{tmp_path} is loaded in bfloat16: 2 tensors are cast as they are read (stored in F16)"
    ]


def test_wider_is_exact(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path), "float32")
    assert source.tensors["a.weight"].nbytes == 16
    assert read_tensor(source, "a.weight").equal(HALF.float())


def test_a_checkpoint_in_float32_is_cast(tmp_path: Path) -> None:
    path = folder(tmp_path, {"torch_dtype": "float32"}, big=torch.ones(100), experts=torch.ones(2, 2))
    source = open_source(path, "bfloat16")
    assert {source.tensors[name].dtype for name in ("a.weight", "bias", "big", "experts")} == {"BF16"}


def test_digests_are_of_the_files(tmp_path: Path) -> None:
    source, held = open_source(folder(tmp_path), "bfloat16"), Source.open(tmp_path)
    assert source.digests(threads=1) == held.digests(threads=1)
    assert source.stored == held.tensors
    read_tensor(source, "a.weight")
    overwrite(tmp_path / "model.safetensors", held.tensors["a.weight"].start, raw_bytes(HALF * 2).tobytes())
    with pytest.raises(IdentityMismatch, match=r"tensors\.a\.weight: "):
        read_tensor(source, "a.weight")


def test_quantized_weights_come_in_the_dtype_at_once(tmp_path: Path) -> None:
    save_file(
        {
            "up.weight": torch.tensor([[1.0, -0.5]]).to(torch.float8_e4m3fn),
            "up.weight_scale": torch.tensor(1.0009765625),
            "norm.weight": torch.ones(2).half(),
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float16"}))
    source = open_source(tmp_path, "float32")
    assert {name: entry.dtype for name, entry in source.tensors.items()} == {
        "norm.weight": "F32", "up.weight": "F32",
    }  # fmt: skip
    assert read_tensor(source, "up.weight").tolist() == [[1.0009765625, -0.50048828125]]
    assert source.quantized == {"up.weight": "FP8 per tensor"}


def test_what_float16_can_t_hold_is_named(tmp_path: Path) -> None:
    config = {"dtype": "bfloat16"}
    require_held_by_dtype(open_source(folder(tmp_path, config), "float16"))
    path = folder(tmp_path, config, wide=torch.tensor([70000.0] * 20).bfloat16())
    with pytest.raises(InputError, match="wide reaches 70144, and float16 ends at 65504; give --dtype bfl"):
        require_held_by_dtype(open_source(path, "float16"))


def test_configurations_say_it_wherever_they_name_a_dtype() -> None:
    parts = {"torch_dtype": "float16", "text_config": {"dtype": "float16", "mamba_ssm_dtype": "float32"}}
    assert with_dtype(parts, "bfloat16") == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "mamba_ssm_dtype": "float32"},
    }
    assert with_dtype({"layers": 2}, "float32") == {"layers": 2, "torch_dtype": "float32"}


def test_every_part_is_built_in_the_dtype(tmp_path: Path) -> None:
    part = {"hidden_size": 32, "num_hidden_layers": 1, "dtype": "float16"}
    content = {"model_type": "qwen3_vl", "text_config": part, "vision_config": part, "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = load_config(tmp_path, dtype="bfloat16")
    assert {config.dtype, config.text_config.dtype, config.vision_config.dtype} == {torch.bfloat16}
