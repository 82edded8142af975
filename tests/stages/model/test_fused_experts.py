"""Where each expert's projections lie: literal tensors, in every layout that hubs hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.model.fused_experts import expert_matrices, fused_hub_name
from stages.model.modules import Arrangement
from state.errors import InputError
from state.source import Source

# One expert: gate is [[1, 2, 3], [4, 5, 6]], up [[7, 8, 9], [10, 11, 12]].
GATE, UP = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]
HALVES = torch.tensor([[*GATE, *UP]])
IN_TURNS = torch.tensor([[GATE[0], UP[0], GATE[1], UP[1]]])


def experts(transposed: bool = False, interleaved: bool = False) -> Arrangement:
    return Arrangement(gated=True, transposed=transposed, interleaved=interleaved, biased=False)


def source(folder: Path, **tensors: torch.Tensor) -> Source:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Source.open(folder)


@pytest.mark.parametrize(
    ("stored", "module", "shape", "operations"),
    [
        (HALVES, experts(), (1, 4, 3), ()),
        (HALVES.mT, experts(), (1, 4, 3), ()),
        (HALVES.mT, experts(transposed=True), (1, 3, 4), ()),
        (HALVES, experts(transposed=True), (1, 3, 4), ()),
        (IN_TURNS, experts(interleaved=True), (1, 4, 3), ()),
        (IN_TURNS.mT, experts(transposed=True, interleaved=True), (1, 3, 4), ()),
        (HALVES.mT, experts(), (1, 4, 3), ("Transpose",)),
    ],
    ids=["halves", "transposed on the hub", "transposed", "on loading", "in turns", "both", "always"],
)
def test_gate_and_up_in_one_tensor(
    tmp_path: Path,
    stored: torch.Tensor,
    module: Arrangement,
    shape: tuple[int, ...],
    operations: tuple[str, ...],
) -> None:
    given = source(tmp_path, fused=stored)
    entries = [given.tensors["fused"]]
    found = expert_matrices("m.experts", ("gate_proj", "up_proj"), module, shape, entries, operations)
    assert {name: matrix.read(given).tolist() for name, matrix in found.items()} == {
        "m.experts.0.gate_proj": GATE,
        "m.experts.0.up_proj": UP,
    }


def test_a_square_tensor_that_loading_always_transposes(tmp_path: Path) -> None:
    given = source(tmp_path, fused=torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    found = expert_matrices(
        "e", ("down_proj",), experts(), (1, 2, 2), [given.tensors["fused"]], ("Transpose",)
    )
    assert found["e.0.down_proj"].read(given).tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_gate_and_up_in_tensors_of_their_own(tmp_path: Path) -> None:
    given = source(tmp_path, gate=torch.tensor([GATE, UP]), up=torch.tensor([UP, GATE]))
    entries = [given.tensors["gate"], given.tensors["up"]]
    found = expert_matrices("e", ("gate_proj", "up_proj"), experts(), (2, 4, 3), entries, {"Concatenate"})
    assert found["e.1.gate_proj"].read(given).tolist() == UP
    assert found["e.1.up_proj"].read(given).tolist() == GATE


def test_what_loading_rearranges_is_refused(tmp_path: Path) -> None:
    given = source(tmp_path, fused=HALVES)
    with pytest.raises(InputError, match="rearranges these experts by Chunk, Interleave as it loads"):
        expert_matrices(
            "e",
            ("gate_proj", "up_proj"),
            experts(),
            (1, 4, 3),
            [given.tensors["fused"]],
            {"Interleave", "Chunk"},
        )


def test_experts_without_tensors_are_refused() -> None:
    with pytest.raises(InputError, match="the checkpoint has no tensor that feeds e"):
        expert_matrices("e", ("down_proj",), experts(), (1, 2, 2), [], ())


def test_another_shape_is_refused(tmp_path: Path) -> None:
    given = source(tmp_path, fused=HALVES)
    with pytest.raises(InputError, match=r"fused has shape \[1, 4, 3\]; for a parameter of \[1, 8, 3\]"):
        expert_matrices("e", ("gate_proj", "up_proj"), experts(), (1, 8, 3), [given.tensors["fused"]], ())


@pytest.mark.parametrize(
    ("tensor", "experts"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts"),
        ("model.layers.0.experts.gate_up_proj", "model.layers.0.experts"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "model.layers.0.block_sparse_moe.experts"),
    ],
)
def test_names(tensor: str, experts: str) -> None:
    assert fused_hub_name(tensor) == experts
