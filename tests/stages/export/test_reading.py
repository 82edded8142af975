"""The source in pieces: what they hold, and that they are what the run was calibrated with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.export.reading import SourceReader
from stages.model.matrices import StoredMatrix
from state.errors import IdentityMismatch, InputError
from state.large_reads import LargeReads
from state.source import Source
from tests.stages.model.changing import overwrite

EXPERTS = torch.arange(8 * 6 * 4.0).reshape(8, 6, 4)
MATRIX = torch.arange(10 * 4.0).reshape(10, 4)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.export.reading.AT_ONCE", 64)


@pytest.fixture
def files() -> object:
    with LargeReads() as found:
        yield found


@pytest.fixture
def reader(tmp_path: Path, files: LargeReads) -> SourceReader:
    save_file(
        {"experts": EXPERTS, "matrix": MATRIX, "one": torch.tensor(2.0)}, tmp_path / "model.safetensors"
    )
    source = Source.open(tmp_path)
    return SourceReader(source, source.digests(1), files)


def test_rows(reader: SourceReader) -> None:
    pieces = list(reader.pieces("matrix", "rows"))
    assert [(piece.first, len(piece.data), piece.total) for piece in pieces] == [
        (0, 4, 10),
        (4, 4, 10),
        (8, 2, 10),
    ]
    assert torch.cat([piece.data for piece in pieces]).equal(MATRIX)


def test_anywhere_and_not_at_all(reader: SourceReader) -> None:
    pieces = list(reader.pieces("matrix", "bytes"))
    assert [piece.nbytes for piece in pieces] == [64, 64, 32]
    assert torch.cat([piece.data for piece in pieces]).view(torch.float32).equal(MATRIX.flatten())
    (whole,) = reader.pieces("one", "whole")
    assert whole.data.equal(torch.tensor(2.0))


def test_experts_and_their_rows(reader: SourceReader) -> None:
    whole = list(reader.pieces("experts", "experts", range(8)))
    assert [piece.expert for piece in whole] == list(range(8))
    assert torch.stack([piece.data for piece in whole]).equal(EXPERTS)
    parts = list(reader.pieces("experts", "experts' rows", range(8)))
    assert [(piece.expert, piece.first, len(piece.data)) for piece in parts[:4]] == [
        (0, 0, 4),
        (0, 4, 2),
        (1, 0, 4),
        (1, 4, 2),
    ]
    assert torch.cat([piece.data for piece in parts]).equal(EXPERTS.flatten(0, 1))


def test_another_tensor_than_the_runs_is_named_by_its_end(reader: SourceReader) -> None:
    reader.digests = {**reader.digests, "experts": "F32[8,6,4] xxh3:0"}
    pieces = reader.pieces("experts", "experts", range(8))
    assert len([next(pieces) for _ in range(7)]) == 7
    with pytest.raises(IdentityMismatch, match=r"tensors\.experts: stored F32\[8,6,4\] xxh3:0"):
        next(pieces)


def test_some_experts_are_compared_before_the_first_is_used(reader: SourceReader) -> None:
    pieces = list(reader.pieces("experts", "experts", [5, 2]))
    assert [piece.expert for piece in pieces] == [2, 5] and pieces[1].data.equal(EXPERTS[5])
    reader.digests = {**reader.digests, "experts": "F32[8,6,4] xxh3:0"}
    with pytest.raises(IdentityMismatch):
        next(SourceReader(reader.source, reader.digests, reader.files).pieces("experts", "experts", [2]))


def test_an_expert_that_changes_after_the_comparison_is_noticed(reader: SourceReader) -> None:
    list(reader.pieces("experts", "experts", [0]))
    entry = reader.source.tensors["experts"]
    overwrite(reader.source.folder / entry.file, entry.start + 5 * 96 + 3, b"\xff")
    list(reader.pieces("experts", "experts", [4]))
    with pytest.raises(IdentityMismatch):
        list(reader.pieces("experts", "experts", [5]))


def test_a_file_that_is_cut_short(reader: SourceReader) -> None:
    entry = reader.source.tensors["matrix"]
    with (reader.source.folder / entry.file).open("r+b") as file:
        file.truncate(entry.start + 20)
    with pytest.raises(InputError, match="was cut short"):
        list(reader.pieces("matrix", "rows"))


@pytest.mark.parametrize("matrix", [StoredMatrix("m"), StoredMatrix("m", first=6, count=5)])
@pytest.mark.parametrize("step", [1, 4, 5, 20])
def test_a_matrix_is_its_rows_in_all_pieces(matrix: StoredMatrix, step: int) -> None:
    for stride in (1, 2, 3):
        one = StoredMatrix("m", first=matrix.first, stride=stride, count=matrix.count)
        rows, whole, seen = torch.arange(20), torch.arange(20)[one.rows], 0
        for first in range(0, 20, step):
            inside, own = one.rows_between(first, min(20, first + step), 20)
            part = rows[first : first + step][inside]
            if len(part):
                assert part.equal(whole[own])
            seen += len(part)
        assert seen == len(whole)
