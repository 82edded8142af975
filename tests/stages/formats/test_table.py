"""What holds for every format of the table."""

import pytest
import torch

from stages.formats import TABLE, WeightFormat
from stages.formats.quantized import round_to_nearest
from stages.formats.weight_format import tensor_amax
from state.errors import InputError

DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
}

each = pytest.mark.parametrize("format", TABLE.values(), ids=TABLE.keys())


def packed(format: WeightFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What export makes of a weight `[N, K]`, by leaf."""
    made = {}
    tensor_scale = None
    if format.tensor_leaf is not None:
        tensor_scale = made[format.tensor_leaf] = format.tensor_scale(tensor_amax(weight).reshape(()))
    scale = format.block_scale(weight, tensor_scale)
    if scale is not None:
        made["weight_scale"] = scale
    return made | {"weight": format.pack(weight, tensor_scale, scale)}


def weight() -> torch.Tensor:
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    values[2, :128] = 0
    values[4] *= 1e-3
    return values


@each
def test_stores_what_it_says(format: WeightFormat) -> None:
    made = packed(format, weight())
    assert {(leaf, DTYPES[tensor.dtype], tuple(tensor.shape)) for leaf, tensor in made.items()} == set(
        format.stored(6, 256)
    )


@each
def test_dequantizes_to_the_nearest_values(format: WeightFormat) -> None:
    nearest = round_to_nearest(format, weight()).dequantize()
    found = format.dequantize(packed(format, weight()))
    assert found.dtype == torch.float32
    assert found.equal(nearest)
    assert (found - weight()).abs().max() < 0.5


@each
def test_a_solvers_codes_are_those_of_packing(format: WeightFormat) -> None:
    codes = round_to_nearest(format, weight()).encoded()["values"]
    assert codes.equal(packed(format, weight())["weight"].view(torch.int8))


@each
def test_partial_blocks_are_refused_by_name(format: WeightFormat) -> None:
    format.refuse("up.weight", (6, 256))
    if format.square:
        assert format.stored(6, 250)[1].shape == (1, 1, 2, 1)
    elif format.block_size:
        with pytest.raises(
            InputError, match=f"up.weight has 250 .*{format.name} blocks of {format.block_size}"
        ):
            format.refuse("up.weight", (6, 250))


def test_odd_rows_do_not_fit_two_in_a_byte() -> None:
    with pytest.raises(InputError, match="5 rows, of which int4_awq packs two into a byte"):
        TABLE["int4_awq"].refuse("up.weight", (5, 256))
