"""Which weights of a checkpoint are quantized, and how: told by dtypes, shapes and the names of the scales
beside them, and compared with what config.json says. What can't be read is refused by name.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stages.model.dequantize.codes import E2M1, E4M3, INT4, Code
from stages.model.dequantize.scaled import ScaledWeight
from stages.model.dequantize.stated import Grain, Stated
from state.errors import InputError
from state.source import TensorEntry

Entries = Mapping[str, TensorEntry]

BLOCK, GROUP = 128, 32
"""Of FP8 blocks, squares; and of the microscaling formats (OCP MX), along a row."""

FLOATS, EXPONENTS, BYTES = ("BF16", "F16", "F32"), ("U8", "F8_E8M0"), ("U8", "I8")
INTEGERS = (*BYTES, "I16", "U16", "I32", "U32", "I64", "U64")
PACKED, BLOCKS, SHAPE = ".weight_packed", "_blocks", ".weight_shape"

SPENT = re.compile(r"([._](input|activation|output)_scale(_ub)?|\.[kvq]_scale)$")
"""Names of scales that say nothing once weights are plain: those of inputs and caches."""

OF_QUANTIZED = re.compile(
    r"(\.weight_scale|weight_scale_2|_scale_inv|weight_packed|weight_(global_scale|zero_point|g_idx|shape)"
    r"|_scales|pre_quant_scale|\.qweight|\.qzeros|\.absmax|\.SCB|\.quant_state\..*)$"
)
"""Names that nothing but a quantized checkpoint has."""


@dataclass(frozen=True)
class Found:
    """The quantized weights of a checkpoint, by the name they are presented under. spent: stored tensors that
    have no meaning beside plain weights.
    """

    weights: dict[str, ScaledWeight] = field(default_factory=dict)
    spent: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Codes:
    """A stored tensor that may hold codes: of which weight, of what shape, how its scales may be named."""

    weight: str
    entry: TensorEntry
    shape: tuple[int, ...]
    code: Code
    scales: tuple[str, ...]


def find_quantized(
    tensors: Entries,
    shapes: Mapping[str, Sequence[int]],
    stated: Stated | None,
    dtype: torch.dtype,
    where: str,
) -> Found:
    """The quantized weights among the tensors of a checkpoint.

    Args:
        shapes: what the tensors named `.weight_shape` hold. stated: what config.json says, None for nothing.
        dtype: that weights are dequantized to. where: the folder, for messages.
    Raises InputError naming the tensor that has no scale, whose scale does not fit it or what config.json
    says, or that is of a scheme that can't be read.
    """
    weights: dict[str, ScaledWeight] = {}
    for codes in filter(None, map(_codes, tensors.values())):
        scale = next((tensors[name] for name in codes.scales if name in tensors), None)
        if scale is None:
            continue
        if codes.weight in weights or (codes.weight in tensors and codes.weight != codes.entry.name):
            raise _refused(where, codes.entry, f"stands for {codes.weight}, which is stored besides")
        if stated is not None and stated.leaves_alone(codes.weight.removesuffix(".weight")):
            raise _refused(where, codes.entry, "is among the modules that config.json says are not quantized")
        weights[codes.weight] = _weight(codes, scale, shapes, stated, dtype, where)
    used = {tensor for weight in weights.values() for tensor in weight.tensors}
    rest = [entry for name, entry in tensors.items() if name not in used]
    spent = tuple(entry.name for entry in rest if weights and SPENT.search(entry.name))
    for entry in rest:
        if entry.name not in spent:
            _refuse_quantized(entry, where)
    if stated is not None and not weights:
        raise InputError(
            f"{where}/config.json says that the checkpoint is already quantized (quant_method is "
            f"{stated.method!r}), and no tensor is; take quantization_config out of it if these are "
            "dequantized weights, or else download both again from one place"
        )
    return Found(weights, spent)


def _codes(entry: TensorEntry) -> _Codes | None:
    name, shape = entry.name, entry.shape
    if name.endswith(BLOCKS) and entry.dtype == "U8" and len(shape) in (3, 4):
        plain = name.removesuffix(BLOCKS)
        return _Codes(plain, entry, (*shape[:-2], shape[-2] * shape[-1]), E2M1, (f"{plain}_scales",))
    if name.endswith(PACKED) and entry.dtype == "I32":
        plain = f"{name.removesuffix(PACKED)}.weight"
        return _Codes(plain, entry, shape, INT4, (f"{plain}_scale",))
    scales: tuple[str, ...] = (f"{name}_scale_inv", f"{name}_scale")
    if name.endswith(".weight"):
        scales = (*scales, f"{name.removesuffix('.weight')}.scale")  # DeepSeek-V4
    if entry.dtype == "F8_E4M3" and not OF_QUANTIZED.search(name):
        return _Codes(name, entry, shape, E4M3, scales)
    if entry.dtype in BYTES and name.endswith(".weight"):
        return _Codes(name, entry, shape, E2M1, scales)
    return None


def _weight(
    codes: _Codes,
    scale: TensorEntry,
    shapes: Mapping[str, Sequence[int]],
    stated: Stated | None,
    dtype: torch.dtype,
    where: str,
) -> ScaledWeight:
    if len(codes.shape) not in (2, 3) or 0 in codes.shape:
        raise _refused(where, codes.entry, "is no matrix")
    experts = codes.shape[0] if len(codes.shape) == 3 else None
    rows, columns = codes.shape[-2], codes.shape[-1] * codes.code.per_item
    extra = codes.weight.removesuffix(".weight") + SHAPE
    if codes.code is INT4 and extra in shapes:
        named = list(shapes[extra])
        if len(named) != 2 or (named[0], -(-named[1] // INT4.per_item)) != codes.shape:
            raise _refused(where, codes.entry, f"does not hold the {named} that {extra} says")
        columns = named[1]
    microscaled = codes.code is E2M1
    if scale.dtype not in EXPONENTS and (microscaled or scale.dtype not in FLOATS):
        raise _refused(where, codes.entry, f"has a scale that can't be read ({_shown(scale)})")
    grid = _grid(scale.shape, experts, rows)
    said = frozenset[Grain]()
    if stated is not None and not microscaled:
        said = stated.int4 if codes.code is INT4 else stated.fp8
    grains = said or _usual(codes.code, scale, grid, columns)
    sizes = ((grain.rows or rows, grain.columns or columns) for grain in grains)
    block = next((size for size in sizes if (-(-rows // size[0]), -(-columns // size[1])) == grid), None)
    if block is None or grid is None:
        raise _refused(where, codes.entry, f"has a scale of another shape ({_shown(scale)}){_as(said)}")
    return ScaledWeight(
        codes=codes.entry.name,
        scale=scale.name,
        code=codes.code,
        rows=rows,
        columns=columns,
        experts=experts,
        grid=grid,
        block=block,
        exponents=scale.dtype in EXPONENTS,
        dtype=dtype,
        # Stored [out, in] by expert; models and their unquantized checkpoints have [in, out].
        transposed=experts is not None and codes.entry.name.endswith(BLOCKS),
        extra=(extra,) if codes.code is INT4 and extra in shapes else (),
    )


def _grid(shape: tuple[int, ...], experts: int | None, rows: int) -> tuple[int, int] | None:
    """Rows and columns of the scales of one matrix, None where they can't be of one."""
    if experts is not None:
        if shape[:1] != (experts,):
            return None
        shape = shape[1:]
    if shape in ((), (1,)):
        return 1, 1
    if shape == (rows,):
        return rows, 1
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # modelopt's FP8_PB_WO
        shape = shape[::2]
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _usual(code: Code, scale: TensorEntry, grid: tuple[int, int] | None, columns: int) -> Iterator[Grain]:
    """What scales may span where nothing is said of it."""
    if code is not E2M1:
        yield from (Grain(None, None), Grain(1, None))
    if code is E4M3:
        yield Grain(BLOCK, BLOCK)
    if code is INT4 and grid is not None and grid[1] and columns % grid[1] == 0:
        yield Grain(1, columns // grid[1])
    if scale.dtype in EXPONENTS:
        yield Grain(1, GROUP)


def _refuse_quantized(entry: TensorEntry, where: str) -> None:
    """Raise InputError for a tensor that is quantized in a way that can't be read."""
    named = OF_QUANTIZED.search(entry.name) is not None
    if entry.dtype == "F8_E4M3" and not named:
        raise _refused(where, entry, f"has no scale beside it (such as {entry.name}_scale_inv)")
    codes = entry.dtype in INTEGERS and entry.name.endswith((".weight", BLOCKS))
    if named or codes or entry.dtype.startswith(("F8_", "F6_", "F4")):
        raise _refused(where, entry, "is of a scheme that can't be read here")


def _as(said: frozenset[Grain]) -> str:
    shown = [f"{grain.rows or 'all'} x {grain.columns or 'all'}" for grain in said]
    return f", and config.json says one for {' or '.join(sorted(shown))}" if said else ""


def _shown(entry: TensorEntry) -> str:
    return f"{entry.name} is {entry.dtype}{list(entry.shape)}"


def _refused(where: str, entry: TensorEntry, why: str) -> InputError:
    return InputError(
        f"{where} is already quantized, and can't be dequantized: {_shown(entry)}, and it {why}; give the "
        "unquantized model it was made from as MODEL"
    )
