"""Matrices out of literal tensors: fused, transposed and interleaved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def test_many_at_once_equal_single_reads(tmp_path: Path) -> None:
    given = source(tmp_path, experts=FUSED)
    for matrices in (
        [StoredMatrix("experts", expert=expert, first=2) for expert in (1, 0)],
        [StoredMatrix("experts", expert=expert, first=1, stride=2) for expert in (0, 1)],
    ):
        stacked = read_stacked(given, matrices)
        assert stacked.equal(torch.stack([matrix.read(given) for matrix in matrices]))
        assert stacked.dtype == matrices[0].read(given).dtype


def test_the_place_of_a_matrix_in_a_tensor_of_experts() -> None:
    whole = torch.zeros(2, 2, 4)
    StoredMatrix("experts", expert=1, transposed=True, first=1, stride=2, count=2).place(whole).fill_(1.0)
    assert whole.tolist() == [[[0.0] * 4] * 2, [[0.0, 1.0, 0.0, 1.0]] * 2]
