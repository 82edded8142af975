"""Rules over values, every one of them read: streaming, a piece of one tensor in memory at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stages.engines.algos import Algo, Leaf
from stages.engines.findings import Finding
from stages.engines.modules import Inventory, Quantized
from stages.engines.scalars import scale_findings, shared_findings
from stages.model.weights import OTHER_DTYPES, TORCH_DTYPES, map_tensor
from stages.progress import Progress
from state.source import Source, TensorEntry

PIECE = 1 << 26
"""Bytes of a tensor that are looked at together."""

E8M0_NAN = 255
E4M3_NAN = 0x7F
"""Without the sign."""


def value_findings(source: Source, inventory: Inventory, progress: Progress) -> Iterator[Finding]:
    """All that is wrong with values, tensor by tensor as they lie in the files."""
    roles = {
        entry.name: (module, leaf)
        for module in inventory.quantized.values()
        if module.algo is not None
        for leaf in module.algo.leaves
        if (entry := module.tensors.get(leaf.name)) is not None
    }
    for entry in sorted(source.tensors.values(), key=lambda entry: (entry.file, entry.start)):
        module, leaf = roles.get(entry.name, (None, None))
        if entry.dtype in TORCH_DTYPES or entry.dtype in OTHER_DTYPES:
            if entry.name in inventory.kv or (leaf is not None and leaf.role in ("scalar", "vector")):
                yield from scale_findings(source, entry)
            elif module is not None and leaf is not None and leaf.role == "blocks":
                yield from _blocks(source, entry, module, leaf)
            elif entry.dtype == "F8_E4M3":
                yield from _codes(source, entry)
            elif entry.dtype in TORCH_DTYPES:
                yield from _plain(source, entry)
        progress.advance(entry.nbytes)
    yield from shared_findings(source, inventory)


def _blocks(source: Source, entry: TensorEntry, module: Quantized, leaf: Leaf) -> Iterator[Finding]:
    """Block scales; of those that are 0, the codes below."""
    not_a_scale = zeros = 0
    scales = map_tensor(source, entry.name)
    if scales.dim() < leaf.axes:
        return  # no scales of blocks: its shape is a finding
    if entry.dtype == "U8":  # e8m0: no zero and no sign
        for piece in _pieces(scales):
            not_a_scale += int((piece == E8M0_NAN).sum())
    else:
        flat = scales.reshape(
            *scales.shape[: -3 if leaf.axes == 4 else -1], scales.shape[-2 if leaf.axes == 4 else -1]
        )
        for start, piece in _rows(flat):
            values = piece.float()
            not_a_scale += int((~(values.isfinite() & (values >= 0))).sum())
            if bool((zero := values == 0).any()):
                zeros += _used_zeros(source, module, leaf, zero, start)
    if not_a_scale:
        yield Finding(
            "block-scale", entry.name, f"{not_a_scale:,} of {scales.numel():,} are NaN, infinite or below 0"
        )
    if zeros:
        yield Finding(
            "block-scale", entry.name, f"{zeros:,} of {scales.numel():,} are 0, and codes under them are not"
        )


def _used_zeros(source: Source, module: Quantized, leaf: Leaf, zero: Tensor, start: int) -> int:
    """Of scales of 0, `[rows, blocks]` from row `start` on, those whose codes are not all 0."""
    if module.together or module.algo is None:
        return int(zero.sum()) if _any_code(source, module) else 0
    codes = map_tensor(source, module.codes.name)
    down, across = module.algo.codes.rows, module.algo.codes.columns
    first, last = start * leaf.rows // down, (start + len(zero)) * leaf.rows // down
    used = nonzero(module.algo, codes[first:last])
    rows = torch.arange(len(used)) // leaf.rows
    columns = torch.arange(codes.shape[1] * across) // leaf.columns
    touched = torch.zeros_like(zero)
    hit = used & zero[rows][:, columns]
    where = hit.nonzero()
    touched[rows[where[:, 0]], columns[where[:, 1]]] = True
    return int(touched.sum())


def _any_code(source: Source, module: Quantized) -> bool:
    return bool((map_tensor(source, module.codes.name).view(torch.uint8) & 0x77 != 0).any())


def nonzero(algo: Algo, codes: Tensor) -> Tensor:
    """Which elements of a weight are not 0: bool `[rows, columns]`, from its codes as they are stored."""
    stored = codes.view(torch.uint8)
    if algo.codes.columns == 2:  # e2m1: two columns in a byte, each with a sign
        return torch.stack([stored & 0x07, stored & 0x70], dim=-1).flatten(-2) != 0
    if algo.codes.rows == 2:  # integers: two rows in a byte
        return torch.stack([stored & 0x0F, stored & 0xF0], dim=-2).flatten(-3, -2) != 0
    return (stored & 0x7F != 0) if codes.dtype == torch.float8_e4m3fn else stored != 0


def _codes(source: Source, entry: TensorEntry) -> Iterator[Finding]:
    codes = map_tensor(source, entry.name).view(torch.uint8)
    bad = sum(int(((piece & E4M3_NAN) == E4M3_NAN).sum()) for piece in _pieces(codes))
    if bad:
        yield Finding("code-nan", entry.name, f"{bad:,} of {codes.numel():,} codes are NaN")


def _plain(source: Source, entry: TensorEntry) -> Iterator[Finding]:
    values = map_tensor(source, entry.name)
    bad = sum(int((~piece.isfinite()).sum()) for piece in _pieces(values))
    if bad:
        yield Finding("not-finite", entry.name, f"{bad:,} of {values.numel():,} values are not finite")


def _pieces(values: Tensor) -> Sequence[Tensor]:
    return values.reshape(-1).split(max(1, PIECE // values.element_size()))


def _rows(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pieces of whole rows and where they begin, of an array whose last axis is one."""
    matrix = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)
    rows = max(1, PIECE // 16 // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), rows):
        yield start, matrix[start : start + rows]
