import errno
import os
from pathlib import Path

import pytest
import torch

from stages.calibrate.forward.buffers import FileBuffer, Limits, MemoryBuffer, open_buffer
from stages.calibrate.forward.hidden import HiddenStates, discard
from stages.calibrate.forward.kept import BrokenRecord, read_boundary
from state.errors import DamagedStore, OutOfSpace

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


def open_states(folder: Path, limits: Limits, said: list[str] | None = None, batch: int = 2) -> HiddenStates:
    said = [] if said is None else said
    return HiddenStates(folder, 2, CPU, limits, {"batch": batch, "identity": "xxh3:1"}, said.append)


def write_all(states: HiddenStates, values: list[dict[str, torch.Tensor]]) -> None:
    for batch, state in enumerate(values):
        states.write(batch, state)


@pytest.mark.parametrize("limits", [MEMORY, FILES], ids=["memory", "files"])
def test_a_layer_reads_one_boundary_while_it_writes_the_next(limits, tmp_path):
    states = open_states(tmp_path, limits)
    states.restore(0)
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
    states = open_states(tmp_path, FILES)
    states.restore(0)
    write_all(states, STATES)
    states.turn()
    states.read(0)["kv"].zero_()
    assert states.read(0)["kv"].tolist() == [7.0]


@pytest.mark.parametrize("limits", [MEMORY, FILES], ids=["memory", "files"])
def test_what_is_peeked_at_stays_and_is_a_copy(limits, tmp_path):
    buffer = open_buffer(tmp_path / "000001.raw", CPU, 64, limits)
    for batch, state in enumerate(STATES):
        buffer.write(batch, state)
    buffer.peek(1)["kv"].zero_()
    assert same(buffer.peek(1), STATES[1]) and same(buffer.peek(0), STATES[0])
    assert all(same(buffer.read(batch), STATES[batch]) for batch in range(2))
    buffer.drop()


@pytest.mark.parametrize("limits", [MEMORY, FILES], ids=["memory", "files"])
def test_both_sides_of_a_layer_are_peeked_at(limits, tmp_path):
    states = open_states(tmp_path, limits)
    states.restore(0)
    for batch, state in enumerate(STATES):
        states.enter(batch, state)
    assert states.layer == 0
    write_all(states, STATES[::-1])
    for _ in range(2):
        assert all(same(states.peek(batch), STATES[batch]) for batch in range(2))
        assert all(same(states.peek_behind(batch), STATES[1 - batch]) for batch in range(2))
    assert same(states.read(0), STATES[0])
    states.turn()
    assert states.layer == 1
    assert same(states.peek(0), STATES[1]) and same(states.read(0), STATES[1])
    states.close()
    assert list(tmp_path.iterdir()) == []


def test_before_anything_is_written_there_is_nothing_to_peek_at(tmp_path):
    with pytest.raises(ValueError, match="no boundary to read yet"):
        open_states(tmp_path, MEMORY).peek(0)


def test_what_was_entered_is_no_boundary_to_go_on_from(tmp_path):
    """It is made again with the embeddings."""
    states = open_states(tmp_path, FILES)
    states.restore(0)
    states.enter(0, STATES[0])
    assert names(tmp_path) == ["000000.raw"]
    said: list[str] = []
    assert open_states(tmp_path, FILES, said).restore(0) == 0
    assert names(tmp_path) == [] and said == []


def test_an_earlier_boundary_is_gone_back_to(tmp_path):
    """Where the other stream has no later one: both begin before the same layer."""
    stop_in_layer_2(tmp_path)
    states = open_states(tmp_path, FILES)
    assert states.find(2) == 2 and states.find(1) == states.layer == 1
    assert same(states.read(0), STATES[0])
    states.settle()
    assert names(tmp_path) == ["000001.json", "000001.raw"]
    assert states.find(0) == 0
    states.settle()
    assert names(tmp_path) == []


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
    states = open_states(tmp_path, MEMORY)
    states.restore(0)
    write_all(states, STATES)
    states.seal()
    assert list(tmp_path.iterdir()) == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_in_layer_2(folder: Path) -> None:
    """Layers 0 and 1 are done and sealed, layer 2 has begun."""
    states = open_states(folder, FILES)
    states.restore(0)
    for values in (STATES, STATES[::-1]):
        write_all(states, values)
        states.seal()
        states.turn()
    states.write(0, STATES[0])


def test_a_boundary_stays_until_its_layer_is_committed(tmp_path):
    stop_in_layer_2(tmp_path)  # the commit of layer 1 may still be under way
    assert names(tmp_path) == ["000001.json", "000001.raw", "000002.json", "000002.raw", "000003.raw"]
    states = open_states(tmp_path, FILES)
    assert states.restore(1) == 1
    assert names(tmp_path) == ["000001.json", "000001.raw"]
    assert all(same(states.read(batch), STATES[batch]) for batch in range(2))
    write_all(states, STATES)
    states.seal()
    states.turn()
    write_all(states, STATES)
    assert names(tmp_path) == ["000001.json", "000001.raw", "000002.json", "000002.raw", "000003.raw"]
    states.turn()
    assert names(tmp_path) == ["000002.json", "000002.raw", "000003.raw"]
    states.close()
    assert names(tmp_path) == []


def test_a_sealed_boundary_is_read_again_by_another_process(tmp_path):
    stop_in_layer_2(tmp_path)
    said: list[str] = []
    states = open_states(tmp_path, FILES, said)
    assert states.restore(2) == states.layer == 2
    assert names(tmp_path) == ["000002.json", "000002.raw"]
    assert all(same(states.read(batch), STATES[1 - batch]) for batch in range(2))
    assert said == []


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_boundary_costs_one_layer(damage, tmp_path):
    stop_in_layer_2(tmp_path)
    path = tmp_path / "000002.raw"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[3] ^= 1
        path.write_bytes(data)
    said: list[str] = []
    assert open_states(tmp_path, FILES, said).restore(2) == 1
    assert len(said) == 1 and said[0].startswith("the hidden states before layer 2 can't be used: ")


def test_every_bit_of_a_record_counts(tmp_path):
    stop_in_layer_2(tmp_path / "whole")
    whole = (tmp_path / "whole" / "000001.json").read_bytes()
    assert len(whole) > 300
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path = tmp_path / "000001.json"
        path.write_bytes(data)
        with pytest.raises(BrokenRecord):
            read_boundary(path, 1, {"batch": 2, "identity": "xxh3:1"})


def test_hidden_states_of_other_circumstances_are_made_anew(tmp_path):
    stop_in_layer_2(tmp_path)
    said: list[str] = []
    assert open_states(tmp_path, FILES, said, batch=4).restore(2) == 0
    assert said == [
        "the hidden states before layer 2 can't be used: they were made under other circumstances "
        "(batch: 2, now 4)",
        "the hidden states before layer 1 can't be used: they were made under other circumstances "
        "(batch: 2, now 4)",
        "the hidden states are made anew from the first layer on",
    ]
    assert names(tmp_path) == []


def test_what_rots_in_a_file_is_noticed_when_it_is_read(tmp_path):
    states = open_states(tmp_path, FILES)
    states.restore(0)
    write_all(states, STATES)
    states.turn()
    with (tmp_path / "000001.raw").open("r+b") as file:
        file.write(b"\x01")
    with pytest.raises(DamagedStore, match=r"000001\.raw holds other bytes at 0 than were written"):
        states.read(0)


def test_nothing_is_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "000001.raw").symlink_to(victim)
    states = open_states(tmp_path / "hidden", FILES)
    write_all(states, STATES)
    states.close()
    assert victim.read_text() == "precious"


def test_files_of_others_stay(tmp_path):
    folder = tmp_path / "activations"
    stop_in_layer_2(folder / "hidden")
    (folder / "before-000002.json").write_text("{}")  # of an older version
    (folder / "notes.txt").write_text("mine")
    assert discard(folder) == [folder / "notes.txt"]
    assert names(folder) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    assert discard(folder) == []
    assert not folder.exists()


def test_the_limit_decides_between_memory_and_file(tmp_path):
    limits = Limits(device=0, host=100)
    assert isinstance(open_buffer(tmp_path / "a", CPU, 100, limits), MemoryBuffer)
    assert isinstance(open_buffer(tmp_path / "b", CPU, 101, limits), FileBuffer)


def test_a_boundary_and_the_batch_between_two_count_against_the_limit(tmp_path):
    # 12 bytes in the first batch, two batches, one of them read and not yet written again.
    for host, files in ((36, []), (35, ["000001.raw"])):
        states = open_states(tmp_path, Limits(device=0, host=host))
        states.restore(0)
        write_all(states, STATES)
        assert [path.name for path in tmp_path.iterdir()] == files


def test_a_full_disk_is_an_error_with_the_file_named(tmp_path, monkeypatch):
    buffer = FileBuffer(tmp_path / "000000.raw", CPU)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutOfSpace, match=r"000000\.raw"):
        buffer.write(0, STATES[0])
