"""The bytes of single output tensors, from a source of three."""

import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.export.checked import CheckedSource
from stages.export.rescale import Rescaling
from stages.export.shards import TensorSpec
from stages.export.tensors import Ingredients, TensorMaker
from stages.export.units import Shard, Unit
from stages.formats import FP8, INT8_SQ, NVFP4, WeightFormat
from stages.model.matrices import StoredMatrix
from state.errors import IdentityMismatch, InputError
from state.identity import tensor_digest
from state.source import Source
from tests.stages.model.changing import overwrite

WEIGHT = torch.tensor([[6.0, -3.0] * 8])
NORM = torch.tensor([1.5], dtype=torch.float32)


def maker(
    folder: Path,
    weight: torch.Tensor,
    weight_format: WeightFormat,
    amax: float,
    dtype: torch.dtype = torch.bfloat16,
) -> TensorMaker:
    """A maker for `up.weight` in one format and `norm.weight` unchanged; the source also holds `extra`."""
    tensors = {"up.weight": weight, "norm.weight": NORM, "extra": NORM.clone()}
    save_file(tensors, folder / "model.safetensors")
    source = Source.open(folder)
    columns = weight.shape[1]
    parts = {
        FP8: [("weight_scale", "F32", ()), ("weight", "F8_E4M3", (1, columns))],
        INT8_SQ: [("weight_scale", "F32", (1,)), ("weight", "I8", (1, columns))],
        NVFP4: [("weight_scale", "F8_E4M3", (1, columns // 16)), ("weight", "U8", (1, columns // 2))],
    }[weight_format]
    specs = tuple(TensorSpec(f"up.{leaf}", dtype, shape) for leaf, dtype, shape in parts)
    leaves = {f"up.{leaf}": leaf for leaf in ("weight", "weight_scale", "weight_scale_2")}
    units = (
        Unit("up.weight", None, specs, {"up": StoredMatrix("up.weight")}, weight_format, leaves),
        Unit("norm.weight", "norm.weight", (TensorSpec("norm.weight", "F32", (1,)),)),
    )
    steps = {FP8: {"up.weight_scale": 448.0}, NVFP4: {"up.weight_scale_2": 2688.0}}.get(weight_format, {})
    scales = {name: torch.tensor(amax / step) for name, step in steps.items()}
    given = Ingredients(source, source.digests(1), {"up": torch.tensor(amax)}, scales, Rescaling(dtype))
    return TensorMaker(given, Shard("model.safetensors", units))


def made(maker: TensorMaker, name: str) -> bytes:
    return bytes(
        maker.make(
            next(spec for unit in maker.unit_of.values() for spec in unit.outputs if spec.name == name)
        )
    )


def test_unquantized_bytes_pass_through(tmp_path: Path) -> None:
    assert made(maker(tmp_path, WEIGHT, NVFP4, 6.0), "norm.weight") == struct.pack("<f", 1.5)


def test_a_packed_weight_and_its_block_scales_are_made_together(tmp_path: Path) -> None:
    one = maker(tmp_path, WEIGHT, NVFP4, 6.0)
    assert made(one, "up.weight") == bytes([0x7 | 0xD << 4] * 8)
    assert set(one.pending) == {"up.weight_scale"}
    assert made(one, "up.weight_scale") == bytes([0x7E])  # 448 in e4m3
    assert one.pending == {}


def test_integer_formats_keep_nothing_between_a_scale_and_its_weight(tmp_path: Path) -> None:
    # A shard has all float32 scales before the first packed weight.
    one = maker(tmp_path, torch.tensor([[127.0, -1.0] * 8]), INT8_SQ, 127.0)
    assert made(one, "up.weight_scale") == struct.pack("<f", 1.0)
    assert one.pending == {}
    assert made(one, "up.weight") == bytes([0x7F, 0xFF] * 8)
    assert one.pending == {}


def test_fp8_weight_and_scale(tmp_path: Path) -> None:
    one = maker(tmp_path, WEIGHT, FP8, 6.0)
    assert made(one, "up.weight") == bytes([0x7E, 0xF6] * 8)
    assert made(one, "up.weight_scale") == struct.pack("<f", 6.0 / 448.0)


def test_the_weight_is_cast_to_the_dtype_the_model_computes_in(tmp_path: Path) -> None:
    # 1 + 2^-9 is 1 in bfloat16: the recorded amax of 1 covers it there, and only there.
    weight = torch.full((1, 16), 1 + 2**-9)
    assert made(maker(tmp_path, weight, FP8, 1.0), "up.weight") == bytes([0x7E] * 16)
    with pytest.raises(InputError, match=r"up\.weight reaches 1\.00195 but the run's weight amax is 1"):
        made(maker(tmp_path, weight, FP8, 1.0, torch.float32), "up.weight")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    weight = WEIGHT.clone()
    weight[0, 3] = bad
    with pytest.raises(InputError, match=r"^up\.weight holds values that are not finite"):
        made(maker(tmp_path, weight, NVFP4, 6.0), "up.weight")


@pytest.mark.parametrize("name", ["up.weight", "norm.weight"])
def test_tensors_of_another_model_are_refused_all_at_once(tmp_path: Path, name: str) -> None:
    one = maker(tmp_path, WEIGHT, NVFP4, 6.0)
    recorded = {**one.ingredients.digests, name: "F32[1] xxh3:0", "extra": "F32[1] xxh3:1"}
    one.checked = CheckedSource(one.ingredients.source, recorded)
    with pytest.raises(IdentityMismatch) as caught:
        made(one, name)
    assert {difference.field for difference in caught.value.differences} == {
        f"tensors.{name}",
        "tensors.extra",
    }


@pytest.mark.parametrize("name", ["up.weight", "norm.weight"])
def test_what_is_packed_is_what_was_digested(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes to the file just behind the look at its digest."""
    expected = made(maker(tmp_path, WEIGHT, NVFP4, 6.0), name)
    one = maker(tmp_path, WEIGHT, NVFP4, 6.0)

    def digest_and_overwrite(source: Source, tensor: str) -> str:
        found = tensor_digest("F32", source.tensors[tensor].shape, source.read(tensor))
        overwrite(tmp_path / "model.safetensors", source.tensors[tensor].start, b"\x00\x00\x40\x40")
        return found

    monkeypatch.setattr(Source, "digest", digest_and_overwrite)
    assert made(one, name) == expected
    with pytest.raises(IdentityMismatch, match=r"model\.safetensors has changed while it was worked from"):
        one.ingredients.source.require_unchanged()


class TestExpertsThatStayTogether:
    """Two experts of 16 inputs, gate and up in turns, stored as `[experts, in, out]`."""

    def maker(self, folder: Path, weight_format: WeightFormat) -> TensorMaker:
        # Row by row: gate of 6 and 3, up of 3 and 6; of the second expert half as much.
        rows = torch.tensor([[6.0], [3.0], [-3.0], [-6.0]]).expand(4, 16)
        save_file({"both": torch.stack([rows, rows / 2]).mT.contiguous()}, folder / "model.safetensors")
        source = Source.open(folder)
        matrices = {
            f"experts.{expert}.{leaf}": StoredMatrix("both", expert, True, first, 2, 2)
            for expert in range(2)
            for first, leaf in enumerate(("gate", "up"))
        }
        stored = {"weight": ("U8", (2, 8, 4)), "weight_scale": ("F8_E4M3", (2, 1, 4))}
        if weight_format is FP8:
            stored = {"weight": ("F8_E4M3", (2, 16, 4))}
        names = {"weight": "both", "weight_scale": "both_weight_scale"}
        specs = tuple(TensorSpec(names[leaf], *held) for leaf, held in stored.items())
        tensor_scale = {NVFP4: ("both_weight_scale_2", 6.0 / 2688), FP8: ("both_weight_scale", 6.0 / 448)}
        name, scale = tensor_scale[weight_format]
        leaves = {names[leaf]: leaf for leaf in stored} | {name: name.removeprefix("both_")}
        unit = Unit("both", None, specs, matrices, weight_format, leaves)
        amax = dict.fromkeys(matrices, torch.tensor(6.0))
        given = Ingredients(
            source, source.digests(1), amax, {name: torch.tensor(scale)}, Rescaling(torch.bfloat16)
        )
        return TensorMaker(given, Shard("model.safetensors", (unit,)))

    def test_nvfp4_is_packed_along_the_inputs(self, tmp_path: Path) -> None:
        one = self.maker(tmp_path, NVFP4)
        # Every block has one magnitude: 6 on the grid (code 7) times amax / 6; the sign is the highest bit.
        row = [0x77, 0x77, 0xFF, 0xFF]
        assert made(one, "both") == bytes(row * 16)
        # 448 for 6, half for 3, a quarter for 1.5, in e4m3; one scale of the tensor for both experts.
        assert made(one, "both_weight_scale") == bytes([0x7E, 0x76, 0x76, 0x7E, 0x76, 0x6E, 0x6E, 0x76])
        assert one.pending == {}

    def test_fp8_has_one_scale(self, tmp_path: Path) -> None:
        one = self.maker(tmp_path, FP8)
        assert made(one, "both") == bytes([0x7E, 0x76, 0xF6, 0xFE] * 16 + [0x76, 0x6E, 0xEE, 0xF6] * 16)

    def test_another_expert_than_was_digested_is_refused(self, tmp_path: Path) -> None:
        one = self.maker(tmp_path, FP8)
        file = tmp_path / "model.safetensors"
        overwrite(file, file.stat().st_size - 2, b"\x00\x00")
        with pytest.raises(IdentityMismatch, match="has changed while it was worked from"):
            made(one, "both")
