"""Matrices out of literal tensors: fused, transposed, interleaved and in FP8 blocks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.model.dequantize import Fp8Blocks
from stages.model.matrices import StoredMatrix, read_stacked
from state.source import Source

# Two experts, each 4 x 3; rows 0 and 1 are gate's, 2 and 3 up's.
FUSED = torch.tensor(
    [
        [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [10.0, 11.0, 12.0]],
        [[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0], [-7.0, -8.0, -9.0], [-10.0, -11.0, -12.0]],
    ]
)
ORDINARY = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16)


def source(folder: Path, **tensors: torch.Tensor) -> Source:
    save_file({name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    return Source.open(folder)


def read(source: Source, matrix: StoredMatrix) -> list[list[float]]:
    found = matrix.read(source)
    assert found.is_contiguous()
    assert tuple(found.shape) == matrix.shape(source.tensors)
    return found.tolist()


def test_a_tensor_of_its_own(tmp_path: Path) -> None:
    given = source(tmp_path, up__weight=ORDINARY)
    matrix = StoredMatrix("up.weight")
    assert read(given, matrix) == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert matrix.read(given).dtype == torch.bfloat16
    assert matrix.tensors == ("up.weight",)


def test_reading_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    given = source(tmp_path, up__weight=ORDINARY)
    before = given.digest("up.weight")
    StoredMatrix("up.weight").read(given).zero_()
    assert StoredMatrix("up.weight").read(given).equal(ORDINARY)
    assert given.digest("up.weight") == before


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (StoredMatrix("experts", expert=0, count=2), [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        (StoredMatrix("experts", expert=1, first=2), [[-7.0, -8.0, -9.0], [-10.0, -11.0, -12.0]]),
        (StoredMatrix("experts", expert=0, first=0, stride=2), [[1.0, 2.0, 3.0], [7.0, 8.0, 9.0]]),
        (StoredMatrix("experts", expert=0, first=1, stride=2), [[4.0, 5.0, 6.0], [10.0, 11.0, 12.0]]),
        (StoredMatrix("experts", expert=1, first=1, stride=2, count=1), [[-4.0, -5.0, -6.0]]),
    ],
    ids=["gate", "up", "interleaved gate", "interleaved up", "one interleaved row"],
)
def test_rows_of_one_expert(tmp_path: Path, matrix: StoredMatrix, expected: list[list[float]]) -> None:
    assert read(source(tmp_path, experts=FUSED), matrix) == expected
    transposed = source(tmp_path, experts=FUSED.mT)
    assert read(transposed, StoredMatrix(**{**vars(matrix), "transposed": True})) == expected


def test_rows_of_a_matrix_that_holds_several(tmp_path: Path) -> None:
    given = source(tmp_path, qkv__weight=ORDINARY)
    assert read(given, StoredMatrix("qkv.weight", first=1, count=1)) == [[3.0, 4.0]]


def fp8(rows: int, columns: int) -> torch.Tensor:
    values = torch.ones(rows, columns)
    values[:, 1::2] = -0.5
    return values.to(torch.float8_e4m3fn)


def test_fp8_blocks(tmp_path: Path) -> None:
    # 130 x 200 in squares of 128: the second row and column of squares are partial.
    scale = torch.tensor([[2.0, 4.0], [8.0, 16.0]])
    given = source(tmp_path, up__weight=fp8(130, 200), up__weight_scale_inv=scale)
    matrix = StoredMatrix("up.weight", dequantizer=Fp8Blocks("up.weight_scale_inv"))
    assert matrix.tensors == ("up.weight", "up.weight_scale_inv")
    found = matrix.read(given)
    assert found.dtype == torch.bfloat16 and found.shape == (130, 200) == matrix.shape(given.tensors)
    expected = torch.ones(130, 200)
    expected[:, 1::2] = -0.5
    expected[:128, :128] *= 2.0
    expected[:128, 128:] *= 4.0
    expected[128:, :128] *= 8.0
    expected[128:, 128:] *= 16.0
    assert found.float().equal(expected)


def test_fp8_blocks_round_to_the_models_dtype(tmp_path: Path) -> None:
    # 1.0 * 1.001 is no bfloat16: its neighbours are 1 and 1.0078125.
    given = source(tmp_path, a=fp8(1, 2), scale=torch.tensor([[1.001]]))
    assert read(given, StoredMatrix("a", dequantizer=Fp8Blocks("scale"))) == [[1.0, -0.5]]
    exact = Fp8Blocks("scale", dtype=torch.float32)
    assert read(given, StoredMatrix("a", dequantizer=exact))[0][0] == pytest.approx(1.001, rel=1e-7)


def test_fp8_blocks_of_fused_and_transposed_experts(tmp_path: Path) -> None:
    codes = torch.stack([fp8(4, 2), fp8(4, 2)])
    given = source(tmp_path, experts=codes, scale=torch.tensor([[[1.0]], [[2.0]]]))
    matrix = StoredMatrix("experts", expert=1, transposed=True, count=1, dequantizer=Fp8Blocks("scale"))
    # Stored [in = 4, out = 2]: row 0 of the matrix is column 0 of the codes.
    assert read(given, matrix) == [[2.0, 2.0, 2.0, 2.0]]


def test_many_at_once_equal_single_reads(tmp_path: Path) -> None:
    given = source(tmp_path, experts=FUSED, codes=torch.stack([fp8(4, 2)] * 2), scale=torch.ones(2, 1, 1))
    for matrices in (
        [StoredMatrix("experts", expert=expert, first=2) for expert in (1, 0)],
        [StoredMatrix("experts", expert=expert, first=1, stride=2) for expert in (0, 1)],
        [StoredMatrix("codes", expert=expert, dequantizer=Fp8Blocks("scale")) for expert in (0, 1)],
    ):
        stacked = read_stacked(given, matrices)
        assert stacked.equal(torch.stack([matrix.read(given) for matrix in matrices]))
        assert stacked.dtype == matrices[0].read(given).dtype
