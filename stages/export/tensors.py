"""Output tensors, piece by piece: what is read of the source for them, and what is made of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, lcm

import torch
from torch import Tensor

from stages.export.cast import kept_block_amax
from stages.export.reading import ROWS, Cut, Piece, SourceReader
from stages.export.rescale import Rescaling
from stages.export.scales import stored, stored_vector
from stages.export.shards import Made
from stages.export.solved import Solved
from stages.export.units import Shard, Unit
from stages.model.raw import raw_bytes
from stages.model.weights import largest_magnitude
from state.errors import InputError
from state.source import Source


@dataclass(frozen=True)
class Ingredients:
    """What the tensors of a checkpoint are made from.

    digests: hub tensor → what the run recorded of it; weight_amax: module → its largest |w| there, float32
    `[]`. scales: output tensor → float32 `[]`. solved: a solver's solutions, None for `max`.
    cast: modules that keep the source's scales.
    """

    source: Source
    digests: Mapping[str, str]
    weight_amax: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    rescaling: Rescaling
    solved: Solved | None = None
    cast: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Work:
    """What is made at a time of a shard, for some of its units: what comes of a piece of a source tensor, or,
    without one, all that is known without the source.
    """

    file: str
    units: tuple[Unit, ...]
    piece: Piece | None = None

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes if self.piece is not None else 0


def all_work(shards: Iterable[Shard], given: Ingredients, reader: SourceReader) -> Iterator[Work]:
    """The work of shard after shard, in each tensor by tensor as they lie in the source.

    Raises IdentityMismatch when a source tensor is not the one the run was calibrated with, naming every such
    tensor, at the latest at the end of its shard.
    """
    for shard in shards:
        yield Work(shard.file, shard.units)
        readers = sources(shard)
        entries = sorted((given.source.tensors[name] for name in readers), key=lambda e: (e.file, e.start))
        for entry in entries:
            by_expert: dict[int | None, list[Unit]] = {}
            for unit in readers[entry.name]:
                for expert in dict.fromkeys(matrix.expert for matrix in unit.matrices.values()) or (None,):
                    by_expert.setdefault(expert, []).append(unit)
            cut = cut_of(entry.name, readers[entry.name], given.rescaling)
            experts = [one for one in by_expert if one is not None]
            for piece in reader.pieces(entry.name, cut, experts, rows_together(readers[entry.name])):
                yield Work(shard.file, tuple(by_expert.get(piece.expert, ())), piece)


def sources(shard: Shard) -> dict[str, list[Unit]]:
    """Every source tensor that a shard needs, and the units that are made from it."""
    found: dict[str, list[Unit]] = {}
    for unit in shard.units:
        names = {matrix.tensor for matrix in unit.matrices.values()}
        for name in names | ({unit.source} if unit.source else set()):
            found.setdefault(name, []).append(unit)
    return found


def cut_of(name: str, units: Sequence[Unit], rescaling: Rescaling) -> Cut:
    """How a source tensor may be cut, for the units that are made from it."""
    matrices = [matrix for unit in units for matrix in unit.matrices.values()]
    if not matrices:
        return "whole" if rescaling.changes(name) else "bytes"
    # Rows may share a byte or a scale; experts that stay together are placed one by one in memory.
    by_rows = all(len(unit.matrices) == 1 and _whole_groups(unit) for unit in units if unit.matrices)
    if matrices[0].expert is None:
        return "rows" if by_rows else "whole"
    return "experts' rows" if by_rows else "experts"


def rows_together(units: Iterable[Unit]) -> int:
    """Rows of a source tensor that pieces keep together, as the formats of what is made of it need."""
    return lcm(
        ROWS, *(matrix.stride * _together(unit) for unit in units for matrix in unit.matrices.values())
    )


def _whole_groups(unit: Unit) -> bool:
    """Whether rows that are packed together are so in pieces that `rows_together` lets begin."""
    (matrix,) = unit.matrices.values()
    return not matrix.transposed and (matrix.stride > 1 or matrix.first % _together(unit) == 0)


def _together(unit: Unit) -> int:
    return unit.format.rows_together if unit.format is not None else 1


class TensorMaker:
    """Makes the bytes of output tensors, in any thread."""

    def __init__(self, ingredients: Ingredients) -> None:
        self.ingredients = ingredients

    def make(self, work: Work) -> list[Made]:
        """What comes of some work, of each output tensor the bytes that follow those made before.

        Raises InputError for a weight that is not finite or exceeds the amax the run holds for it.
        """
        if work.piece is None:
            return [made for unit in work.units for made in self._given(unit)]
        return [made for unit in work.units for made in self._of_piece(unit, work.piece)]

    def _given(self, unit: Unit) -> Iterator[Made]:
        given = self.ingredients
        for spec in unit.outputs:
            if spec.name in given.scales:
                yield Made(spec.name, stored(given.scales[spec.name]))
            elif unit.leaves.get(spec.name) == "pre_quant_scale":
                (module,) = unit.matrices
                yield Made(spec.name, stored_vector(given.rescaling.pre_quant_scale(module)))

    def _of_piece(self, unit: Unit, piece: Piece) -> Iterator[Made]:
        rescaling = self.ingredients.rescaling
        if unit.source is not None:
            changed = rescaling.changes(unit.source)
            values = rescaling.to_store(unit.source, piece.data) if changed else piece.data
            yield Made(unit.source, raw_bytes(values))
            return
        made: dict[str, Tensor] = {}
        modules = [module for module, matrix in unit.matrices.items() if matrix.expert == piece.expert]
        if len(unit.matrices) == 1:
            made = self._packed(unit, modules[0], piece)
        else:
            shapes = {unit.leaves[spec.name]: spec.shape[1:] for spec in unit.outputs if spec.shape}
            for module in modules:
                for leaf, values in self._packed(unit, module, piece).items():
                    whole = made.setdefault(leaf, torch.empty(shapes[leaf], dtype=values.dtype))
                    unit.matrices[module].part(whole).copy_(values)
        names = {leaf: name for name, leaf in unit.leaves.items()}
        for leaf, values in made.items():
            yield Made(names[leaf], raw_bytes(values))

    def _packed(self, unit: Unit, module: str, piece: Piece) -> dict[str, Tensor]:
        """What a module's rows in a piece add to the outputs of its unit, by leaf."""
        given, matrix, weight_format = self.ingredients, unit.matrices[module], unit.format
        assert weight_format is not None
        if matrix.transposed:
            weight, rows = matrix.part(piece.data), slice(None)
        else:
            inside, rows = matrix.rows_between(piece.first, piece.first + len(piece.data), piece.total)
            weight = piece.data[inside]
        if not len(weight):
            return {}
        rounded = self._rounded(unit, module)
        if rounded:
            return {} if rows.start else rounded
        weight = self._weight(module, weight, rows)
        block_amax = given.solved.block_amax(module) if given.solved is not None else None
        if module in given.cast:
            block_amax = kept_block_amax(given.source, matrix, weight_format)
        if block_amax is not None:
            block_amax = block_amax[rows]
        scaled = (name for name, leaf in unit.leaves.items() if leaf == weight_format.tensor_leaf)
        tensor_scale = given.scales.get(next(scaled, ""))
        scale = weight_format.block_scale(weight, tensor_scale, block_amax)
        if len(unit.matrices) > 1:  # as an expert in a tensor of experts
            blocks = None if scale is None else scale[None]
            packed = weight_format.pack(weight[None], tensor_scale, blocks)[0]
        else:
            packed = weight_format.pack(weight, tensor_scale, scale)
        return {"weight": packed} if scale is None else {"weight": packed, "weight_scale": scale}

    def _rounded(self, unit: Unit, module: str) -> dict[str, Tensor]:
        """What a solver has rounded of a module, by leaf."""
        given, found = self.ingredients, {}
        for name, leaf in unit.leaves.items():
            if given.solved is not None and leaf in ("weight", "weight_scale") and name not in given.scales:
                values = given.solved.rounded(module, leaf)
                if values is not None:
                    found[leaf] = values
        return found

    def _weight(self, module: str, stored_weight: Tensor, rows: slice) -> Tensor:
        """Some rows of a weight as they are to be packed."""
        name, given = f"{module}.weight", self.ingredients
        weight = stored_weight.contiguous().to(given.rescaling.dtype)
        largest = largest_magnitude(weight.reshape(-1)).item()
        recorded = given.weight_amax[module].item()
        if not isfinite(largest):
            raise InputError(f"{name} holds values that are not finite; repair the source checkpoint")
        if largest > recorded:
            raise InputError(
                f"{name} reaches {largest:g} but the run's weight amax is {recorded:g}; "
                "the run was captured from other weights: give those as --model"
            )
        return given.rescaling.to_pack(module, weight, rows)
