import errno
import json
import os

import pytest
import torch

from stages.calibrate.forward.hidden import (
    Boundary,
    FileBuffer,
    HiddenStates,
    Limits,
    MemoryBuffer,
    open_buffer,
)
from state.errors import OutOfSpace

CPU = torch.device("cpu")
MEMORY = Limits(device=0, host=1 << 20)
FILES = Limits(device=0, host=0)
STATES = [
    {"hidden": torch.tensor([[1.5, -2.0], [0.0, 3.0]], dtype=torch.bfloat16), "kv": torch.tensor([7.0])},
    {"hidden": torch.tensor([[4.5, float("nan")]], dtype=torch.bfloat16), "kv": torch.tensor([8.0])},
]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].nan_to_num(9), right[name].nan_to_num(9))
        for name in left
    )


def write_all(states: HiddenStates, values: list[dict[str, torch.Tensor]]) -> None:
    for batch, state in enumerate(values):
        states.write(batch, state)


@pytest.mark.parametrize("limits", [MEMORY, FILES], ids=["memory", "files"])
def test_a_layer_reads_one_boundary_while_it_writes_the_next(limits, tmp_path):
    states = HiddenStates(tmp_path, 2, CPU, limits)
    states.begin()
    write_all(states, STATES)
    states.turn()
    assert states.layer == 1
    doubled = [{name: value * 2 for name, value in state.items()} for state in STATES]
    for batch, state in enumerate(doubled):
        assert same(states.read(batch), STATES[batch])
        states.write(batch, state)
    states.turn()
    assert states.layer == 2
    assert all(same(states.read(batch), doubled[batch]) for batch in range(2))
    states.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_from_a_file_may_be_changed(tmp_path):
    states = HiddenStates(tmp_path, 2, CPU, FILES)
    states.begin()
    write_all(states, STATES)
    states.turn()
    states.read(0)["kv"].zero_()
    assert states.read(0)["kv"].tolist() == [7.0]


def test_memory_hands_a_state_over_without_a_copy():
    buffer, value = MemoryBuffer(CPU, on_device=False), torch.tensor([1.0, 2.0])
    buffer.write(0, {"hidden": value})
    assert buffer.read(0)["hidden"] is value


def test_memory_keeps_no_more_than_a_view():
    buffer, wide = MemoryBuffer(CPU, on_device=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    buffer.write(0, {"hidden": wide[:, 0]})
    wide.zero_()
    held = buffer.read(0)["hidden"]
    assert held.tolist() == [1.0, 3.0]
    assert held.untyped_storage().nbytes() == 8


def test_only_files_can_be_sealed(tmp_path):
    states = HiddenStates(tmp_path, 2, CPU, MEMORY)
    states.begin()
    write_all(states, STATES)
    assert states.seal() is None


def seal_boundary_2(tmp_path) -> Boundary:
    states = HiddenStates(tmp_path, 2, CPU, FILES)
    states.begin()
    write_all(states, STATES)
    states.turn()
    write_all(states, STATES[::-1])
    sealed = states.seal()
    return Boundary.from_json(json.loads(json.dumps(sealed.to_json())))


def test_a_sealed_boundary_is_read_again_by_another_process(tmp_path):
    boundary = seal_boundary_2(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.raw", "000002.raw"]
    states = HiddenStates(tmp_path, 2, CPU, FILES)
    assert states.restore(boundary)
    assert states.layer == 2
    assert [path.name for path in tmp_path.iterdir()] == ["000002.raw"]
    assert all(same(states.read(batch), STATES[1 - batch]) for batch in range(2))


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_boundary_is_not_restored(damage, tmp_path):
    boundary = seal_boundary_2(tmp_path)
    path = tmp_path / "000002.raw"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[3] ^= 1
        path.write_bytes(data)
    assert not HiddenStates(tmp_path, 2, CPU, FILES).restore(boundary)


def test_the_limit_decides_between_memory_and_file(tmp_path):
    limits = Limits(device=0, host=100)
    assert isinstance(open_buffer(tmp_path / "a", CPU, 100, limits), MemoryBuffer)
    assert isinstance(open_buffer(tmp_path / "b", CPU, 101, limits), FileBuffer)


def test_a_boundary_and_the_batch_between_two_count_against_the_limit(tmp_path):
    # 12 bytes in the first batch, two batches, one of them read and not yet written again.
    for host, files in ((36, []), (35, ["000001.raw"])):
        states = HiddenStates(tmp_path, 2, CPU, Limits(device=0, host=host))
        states.begin()
        write_all(states, STATES)
        assert [path.name for path in tmp_path.iterdir()] == files


def test_a_full_disk_is_an_error_with_the_file_named(tmp_path, monkeypatch):
    buffer = FileBuffer(tmp_path / "000000.raw", CPU)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutOfSpace, match=r"000000\.raw"):
        buffer.write(0, STATES[0])
