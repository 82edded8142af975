"""The bytes of single output tensors, from a source of three."""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.export.reading import SourceReader
from stages.export.rescale import Rescaling
from stages.export.shards import TensorSpec
from stages.export.tensors import Ingredients, TensorMaker, all_work
from stages.export.units import Shard, Unit
from stages.formats import FP8, FP8_PB_WO, FP8_PC_PT, INT4_AWQ, INT8_SQ, MXFP4, MXFP8, NVFP4, WeightFormat
from stages.model.matrices import StoredMatrix
from stages.model.raw import raw_bytes
from state.errors import IdentityMismatch, InputError
from state.large_reads import LargeReads
from state.source import Source
from tests.stages.model.changing import overwrite

WEIGHT = torch.tensor([[6.0, -3.0] * 8])
NORM = torch.tensor([1.5], dtype=torch.float32)


@dataclass
class Export:
    """The ingredients of a shard."""

    ingredients: Ingredients
    shard: Shard

    def made(self) -> dict[str, bytes]:
        """Every output, from all that is made of it."""
        found: dict[str, bytes] = {}
        given, maker = self.ingredients, TensorMaker(self.ingredients)
        with LargeReads() as files:
            for work in all_work([self.shard], given, SourceReader(given.source, given.digests, files)):
                for name, data in maker.make(work):
                    found[name] = found.get(name, b"") + bytes(data)
        return found


def maker(
    folder: Path,
    weight: torch.Tensor,
    weight_format: WeightFormat,
    amax: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Export:
    """An export of `up.weight` in one format and `norm.weight` unchanged; the source also holds `extra`."""
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
    return Export(given, Shard("model.safetensors", units))


def made(export: Export, name: str) -> bytes:
    """The bytes of an output of an export; all of the shard is made."""
    return export.made()[name]


def test_unquantized_bytes_pass_through(tmp_path: Path) -> None:
    assert made(maker(tmp_path, WEIGHT, NVFP4, 6.0), "norm.weight") == struct.pack("<f", 1.5)


def test_a_packed_weight_and_its_block_scales(tmp_path: Path) -> None:
    one = maker(tmp_path, WEIGHT, NVFP4, 6.0)
    assert made(one, "up.weight") == bytes([0x7 | 0xD << 4] * 8)
    assert made(one, "up.weight_scale") == bytes([0x7E])  # 448 in e4m3


def test_integers_and_their_scales(tmp_path: Path) -> None:
    one = maker(tmp_path, torch.tensor([[127.0, -1.0] * 8]), INT8_SQ, 127.0)
    assert made(one, "up.weight_scale") == struct.pack("<f", 1.0)
    assert made(one, "up.weight") == bytes([0x7F, 0xFF] * 8)


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
    one.ingredients = replace(one.ingredients, digests=recorded)
    with pytest.raises(IdentityMismatch) as caught:
        one.made()
    assert {difference.field for difference in caught.value.differences} == {
        f"tensors.{name}",
        "tensors.extra",
    }


class TestExpertsThatStayTogether:
    """Two experts of 16 inputs, gate and up in turns, stored as `[experts, in, out]`."""

    def maker(self, folder: Path, weight_format: WeightFormat) -> Export:
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
        return Export(given, Shard("model.safetensors", (unit,)))

    def test_nvfp4_is_packed_along_the_inputs(self, tmp_path: Path) -> None:
        one = self.maker(tmp_path, NVFP4)
        # Every block has one magnitude: 6 on the grid (code 7) times amax / 6; the sign is the highest bit.
        row = [0x77, 0x77, 0xFF, 0xFF]
        assert made(one, "both") == bytes(row * 16)
        # 448 for 6, half for 3, a quarter for 1.5, in e4m3; one scale of the tensor for both experts.
        assert made(one, "both_weight_scale") == bytes([0x7E, 0x76, 0x76, 0x7E, 0x76, 0x6E, 0x6E, 0x76])

    def test_fp8_has_one_scale(self, tmp_path: Path) -> None:
        one = self.maker(tmp_path, FP8)
        assert made(one, "both") == bytes([0x7E, 0x76, 0xF6, 0xFE] * 16 + [0x76, 0x6E, 0xEE, 0xF6] * 16)

    def test_another_expert_than_was_digested_is_refused(self, tmp_path: Path) -> None:
        one = self.maker(tmp_path, FP8)
        file = tmp_path / "model.safetensors"
        overwrite(file, file.stat().st_size - 2, b"\x00\x00")
        with pytest.raises(IdentityMismatch):
            made(one, "both")


class TestSeveralMatricesInOneTensor:
    """Two experts of gate and up, `[experts, rows, 128]`, one behind the other or in turns."""

    @pytest.mark.parametrize(
        "weight_format",
        [NVFP4, FP8, INT4_AWQ, INT8_SQ, MXFP4, MXFP8, FP8_PC_PT, FP8_PB_WO.with_blocks(4)],
        ids=lambda one: one.name,
    )
    @pytest.mark.parametrize("in_turns", [False, True])
    def test_pieces_make_what_the_whole_makes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat, in_turns: bool
    ) -> None:
        weight = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
        save_file({"both": weight}, tmp_path / "model.safetensors")
        source = Source.open(tmp_path)
        amax, scales, units = {}, {}, []
        for expert in range(2):
            for number, leaf in enumerate(("gate", "up")):
                module = f"experts.{expert}.{leaf}"
                matrix = StoredMatrix(
                    "both", expert, False, number if in_turns else 12 * number, 1 + in_turns, 12
                )
                amax[module] = weight.abs().amax().float()
                held = weight_format.stored(12, 128)
                leaves = {f"{module}.{one.leaf}": one.leaf for one in held}
                specs = tuple(TensorSpec(f"{module}.{one.leaf}", *one[1:]) for one in held)
                if weight_format.tensor_leaf is not None:
                    scales[f"{module}.{weight_format.tensor_leaf}"] = weight_format.tensor_scale(amax[module])
                units.append(Unit(f"{module}.weight", None, specs, {module: matrix}, weight_format, leaves))
        given = Ingredients(source, source.digests(1), amax, scales, Rescaling(torch.bfloat16))
        whole = Export(given, Shard("model.safetensors", tuple(units))).made()
        monkeypatch.setattr("stages.export.reading.AT_ONCE", 1024)
        assert Export(given, Shard("model.safetensors", tuple(units))).made() == whole
        for unit in units:  # and each is what its matrix alone makes
            ((module, matrix),) = unit.matrices.items()
            own = matrix.part(weight[matrix.expert])
            shared = scales.get(f"{module}.{weight_format.tensor_leaf}")
            scale = weight_format.block_scale(own, shared)
            expected = weight_format.pack(own.contiguous(), shared, scale)
            assert whole[f"{module}.weight"] == bytes(raw_bytes(expected))
        parts = [Export(given, Shard("one", (unit,))).made() for unit in units]  # some experts alone
        assert {name: data for part in parts for name, data in part.items()} == whole
