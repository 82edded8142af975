"""What an export should hold, from the writer's own weights."""

import fnmatch
from dataclasses import dataclass

import torch

from tests.families.layout import Family, Fused


@dataclass(frozen=True)
class Matrix:
    """One matrix that an export may quantize: its module in the export's names, and its values [.., out,
    in]. `transposed`: the export stores it as [.., in, out], packed along `in` all the same."""

    module: str
    value: torch.Tensor
    transposed: bool = False


def matrices(family: Family, weights: dict[str, torch.Tensor]) -> dict[str, list[Matrix]]:
    """Hub name -> the matrices that the tensor holds under the names that engines ask for.

    A linear is one; fused experts are one for each expert and projection, or, where they stay fused, one
    [expert, out, in] of the tensor's own name.
    """
    found = {}
    for name, tensor in family.layout.tensors.items():
        if tensor.kind == "linear":
            found[name] = [Matrix(name.removesuffix(".weight"), weights[name])]
        elif tensor.kind == "experts":
            found[name] = list(split(name, weights[name], family.layout.fused[name]))
    return found


def split(name: str, value: torch.Tensor, fused: Fused) -> list[Matrix]:
    """The matrices of a tensor that holds all experts of a layer."""
    rows = value.transpose(1, 2) if fused.transposed else value
    if fused.expert is None:
        return [Matrix(name, rows, fused.transposed)]
    found = []
    for expert, matrix in enumerate(rows):
        for number, part in enumerate(fused.parts):
            share = part_of(matrix, number, fused)
            found.append(Matrix(fused.expert.format(expert=expert, part=part), share))
    return found


def part_of(matrix: torch.Tensor, number: int, fused: Fused) -> torch.Tensor:
    """The rows of one projection in an expert's matrix [out, in]."""
    count = len(fused.parts)
    if fused.interleaved:
        return matrix[number::count]
    return matrix.chunk(count)[number]


def joined(name: str, found: dict[str, torch.Tensor], fused: Fused, count: int) -> torch.Tensor:
    """A fused tensor of the hub, put together from matrices by module: the inverse of `split`."""
    if fused.expert is None:
        rows = found[name]
    else:
        experts = []
        for expert in range(count):
            parts = [found[fused.expert.format(expert=expert, part=part)] for part in fused.parts]
            if fused.interleaved:
                experts.append(torch.stack(parts, 1).flatten(0, 1))
            else:
                experts.append(torch.cat(parts))
        rows = torch.stack(experts)
    return rows.transpose(1, 2).contiguous() if fused.transposed else rows


def unbuilt(family: Family, name: str) -> bool:
    """Whether transformers' class never makes this tensor."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in family.unbuilt)
