"""Where each expert's projections lie: literal tensors, in every layout that hubs hold."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.model.fused_experts import expert_matrices, fused_hub_name
from state.errors import InputError
from state.source import Source

# One expert: gate is [[1, 2, 3], [4, 5, 6]], up [[7, 8, 9], [10, 11, 12]].
GATE, UP = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]
HALVES = torch.tensor([[*GATE, *UP]])
IN_TURNS = torch.tensor([[GATE[0], UP[0], GATE[1], UP[1]]])


@dataclass(frozen=True)
class Experts:
    """What transformers says of an experts module."""

    is_transposed: bool = False
    is_concatenated: bool = True


def source(folder: Path, **tensors: torch.Tensor) -> Source:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Source.open(folder)


@pytest.mark.parametrize(
    ("stored", "module", "shape", "operations"),
    [
        (HALVES, Experts(), (1, 4, 3), ()),
        (HALVES.mT, Experts(), (1, 4, 3), ()),
        (HALVES.mT, Experts(is_transposed=True), (1, 3, 4), ()),
        (HALVES, Experts(is_transposed=True), (1, 3, 4), ()),
        (IN_TURNS, Experts(is_concatenated=False), (1, 4, 3), ()),
        (IN_TURNS.mT, Experts(is_transposed=True, is_concatenated=False), (1, 3, 4), ()),
        (HALVES.mT, Experts(), (1, 4, 3), ("Transpose",)),
    ],
    ids=["halves", "transposed on the hub", "transposed", "on loading", "in turns", "both", "always"],
)
def test_gate_and_up_in_one_tensor(
    tmp_path: Path, stored: torch.Tensor, module: Experts, shape: tuple[int, ...], operations: tuple[str, ...]
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
        "e", ("down_proj",), Experts(), (1, 2, 2), [given.tensors["fused"]], ("Transpose",)
    )
    assert found["e.0.down_proj"].read(given).tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_gate_and_up_in_tensors_of_their_own(tmp_path: Path) -> None:
    given = source(tmp_path, gate=torch.tensor([GATE, UP]), up=torch.tensor([UP, GATE]))
    entries = [given.tensors["gate"], given.tensors["up"]]
    found = expert_matrices("e", ("gate_proj", "up_proj"), Experts(), (2, 4, 3), entries, {"Concatenate"})
    assert found["e.1.gate_proj"].read(given).tolist() == UP
    assert found["e.1.up_proj"].read(given).tolist() == GATE


def test_what_loading_rearranges_is_refused(tmp_path: Path) -> None:
    given = source(tmp_path, fused=HALVES)
    with pytest.raises(InputError, match="rearranges these experts by Chunk, Interleave as it loads"):
        expert_matrices(
            "e",
            ("gate_proj", "up_proj"),
            Experts(),
            (1, 4, 3),
            [given.tensors["fused"]],
            {"Interleave", "Chunk"},
        )


def test_another_shape_is_refused(tmp_path: Path) -> None:
    given = source(tmp_path, fused=HALVES)
    with pytest.raises(InputError, match=r"fused has shape \[1, 4, 3\]; for a parameter of \[1, 8, 3\]"):
        expert_matrices("e", ("gate_proj", "up_proj"), Experts(), (1, 8, 3), [given.tensors["fused"]], ())


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
