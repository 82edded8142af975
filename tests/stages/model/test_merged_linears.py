"""Which rows of a class's linear each of the hub's is."""

import pytest
import torch

from stages.model.merged_linears import linears_of
from stages.model.modules import LinearModule
from state.errors import InputError
from state.source import TensorEntry

WHOLE = LinearModule("mlp.up_proj", "mlp.gate_up_proj", in_features=2, out_features=5)


def entry(name: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, "BF16", shape, "model.safetensors", 0, 0)


def test_one_below_the_other() -> None:
    sources = [entry("mlp.gate_proj.weight", 3, 2), entry("mlp.up_proj.weight", 2, 2)]
    gate, up = linears_of(WHOLE, sources, {"Concatenate"})
    assert gate == LinearModule("mlp.gate_proj", "mlp.gate_up_proj", 2, 3, 0, merged=True)
    assert up == LinearModule("mlp.up_proj", "mlp.gate_up_proj", 2, 2, 3, merged=True)
    weight = torch.arange(10).reshape(5, 2)
    assert gate.rows_of(weight).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert up.rows_of(weight).tolist() == [[6, 7], [8, 9]]
    assert WHOLE.rows_of(weight).equal(weight)


def test_a_linear_of_one_tensor_or_none_is_itself() -> None:
    assert linears_of(WHOLE, [entry("mlp.up_proj.weight", 5, 2)], ()) == [WHOLE]
    assert linears_of(WHOLE, [], ()) == [WHOLE]


@pytest.mark.parametrize(
    ("shapes", "operations"),
    [
        ([(3, 2), (2, 2)], {"Concatenate", "Interleave"}),
        ([(5, 1), (5, 1)], {"Concatenate"}),
        ([(3, 2), (3, 2)], {"Concatenate"}),
        ([(5, 2), (5, 2)], set()),
    ],
    ids=["rearranged", "side by side", "too many rows", "twice"],
)
def test_everything_else_is_refused(shapes: list[tuple[int, int]], operations: set[str]) -> None:
    sources = [entry(f"{name}.weight", *shape) for name, shape in zip("ab", shapes, strict=True)]
    with pytest.raises(InputError, match=r"a\.weight, b\.weight: transformers makes mlp\.gate_up_proj"):
        linears_of(WHOLE, sources, operations)
