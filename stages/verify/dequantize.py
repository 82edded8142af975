"""What an engine computes with, from the tensors of a quantized module: for every format of the table of
engines, from what that says of it alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.engines.algos import Algo
from stages.formats.grids import decode_e2m1, decode_int4


def values_of(algo: Algo, codes: Tensor) -> Tensor:
    """The numbers that codes stand for, f32 `[rows, columns]`, without any scale."""
    if algo.codes.columns == 2:
        return decode_e2m1(codes)
    if algo.codes.rows == 2:
        return decode_int4(codes)
    return codes.float()


def dequantized(algo: Algo, stored: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Some rows of a weight, f32 `[rows, columns]`. rows: whole, with a start that blocks of rows divide.

    W = value * scale of its block or row * scale of the tensor; a scale of the tensor that divides nothing
    (W4A8_AWQ) is left out.
    """
    down = algo.codes.rows
    weight = values_of(algo, stored["weight"][rows.start // down : -(-rows.stop // down)])
    scale = algo.leaf("weight_scale")
    assert scale is not None
    held = stored["weight_scale"]
    if scale.dtype == "U8":
        held = torch.exp2(held.float() - 127)
    if scale.role == "scalar":
        return weight * held.float().reshape(())
    if scale.role == "vector":
        return weight * held[rows].float()[:, None]
    matrix = held.reshape(held.shape[0], -1)
    first, last = rows.start // scale.rows, -(-rows.stop // scale.rows)
    steps = matrix[first:last].float()
    if scale.dtype == "F8_E4M3":
        steps = steps * stored["weight_scale_2"].float().reshape(())
    if scale.rows > 1:
        steps = steps.repeat_interleave(scale.rows, 0)[: len(weight)]
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % scale.columns))
    scaled = blocks.unflatten(-1, (-1, scale.columns)).mul_(steps[..., None]).flatten(-2)
    return scaled[:, : weight.shape[1]]
