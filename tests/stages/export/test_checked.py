"""Fused experts are compared with the run's record once as a whole, and afterwards expert by expert."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.export.checked import CheckedSource
from state.errors import IdentityMismatch
from state.source import Source

EXPERTS = 8


class Counting(Source):
    """Counts how often a tensor is digested as a whole."""

    count = 0

    def digest(self, name: str) -> str:
        Counting.count += 1
        return super().digest(name)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    tensors = {"experts.down_proj": torch.arange(EXPERTS * 6.0).reshape(EXPERTS, 2, 3), "norm": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    Counting.count = 0
    return Counting.open(tmp_path)


def overwrite(source: Source, name: str, offset: int) -> None:
    entry = source.tensors[name]
    with (source.folder / entry.file).open("r+b") as file:
        file.seek(entry.start + offset)
        file.write(b"\xff")


def test_a_fused_tensor_is_digested_once(source: Source) -> None:
    checked = CheckedSource(source, {"experts.down_proj": source.digest("experts.down_proj")})
    Counting.count = 0
    for _ in range(3):
        for expert in range(EXPERTS):
            checked.require_same(["experts.down_proj"], expert)
    assert Counting.count == 1


def test_another_tensor_than_the_runs_is_named(source: Source) -> None:
    recorded = source.digests(threads=1) | {"experts.down_proj": "F32[8,2,3] xxh3:0"}
    with pytest.raises(IdentityMismatch, match=r"tensors\.experts\.down_proj: stored F32\[8,2,3\] xxh3:0"):
        CheckedSource(source, recorded).require_same(["experts.down_proj"], 0)


def test_an_expert_that_changes_after_the_first_is_noticed(source: Source) -> None:
    checked = CheckedSource(source, source.digests(threads=1))
    checked.require_same(["experts.down_proj"], 0)
    overwrite(source, "experts.down_proj", 5 * 24 + 3)
    checked.require_same(["experts.down_proj"], 4)
    with pytest.raises(IdentityMismatch, match=r"model\.safetensors has changed"):
        checked.require_same(["experts.down_proj"], 5)


def test_a_tensor_of_its_own_is_compared_whole_each_time(source: Source) -> None:
    checked = CheckedSource(source, source.digests(threads=1))
    checked.require_same(["norm"])
    overwrite(source, "norm", 3)
    with pytest.raises(IdentityMismatch, match=r"model\.safetensors has changed"):
        checked.require_same(["norm"])
