"""Output tensors, one at a time: read from the source, checked against the run's identity, packed."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stages.export.cast import kept_block_amax
from stages.export.checked import CheckedSource
from stages.export.rescale import Rescaling
from stages.export.scales import stored, stored_vector
from stages.export.shards import Bytes, TensorSpec
from stages.export.solved import Solved
from stages.export.units import Shard
from stages.formats import WeightFormat
from stages.model.matrices import StoredMatrix
from stages.model.raw import raw_bytes
from stages.model.weights import largest_magnitude, read_tensor
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


class TensorMaker:
    """Makes the bytes of a shard's tensors. Holds one packed weight at most."""

    def __init__(self, ingredients: Ingredients, shard: Shard) -> None:
        self.ingredients = ingredients
        self.unit_of = {spec.name: unit for unit in shard.units for spec in unit.outputs}
        self.pending: dict[str, Tensor] = {}
        self.checked = CheckedSource(ingredients.source, ingredients.digests)

    def make(self, spec: TensorSpec) -> Bytes:
        """The bytes of one output tensor.

        Raises IdentityMismatch when the source tensor is not the one the run was calibrated with, naming
        every such tensor, or its file changes meanwhile, and InputError for a weight that is not finite or
        exceeds the amax the run holds for it.
        """
        unit, given = self.unit_of[spec.name], self.ingredients
        if spec.name in given.scales:
            return stored(given.scales[spec.name])
        if unit.source is not None:
            return self._unquantized(unit.source)
        assert unit.matrix is not None and unit.format is not None  # KV scales are among the scales
        module, _, leaf = spec.name.rpartition(".")
        if leaf == "pre_quant_scale":
            return stored_vector(given.rescaling.pre_quant_scale(module))
        if spec.name not in self.pending:
            self.pending = self._quantized(unit.matrix, unit.format, module, leaf)
        return raw_bytes(self.pending.pop(spec.name))

    def _unquantized(self, name: str) -> Bytes:
        source, rescaling = self.ingredients.source, self.ingredients.rescaling
        if rescaling.changes(name):
            data = raw_bytes(rescaling.to_store(name, read_tensor(source, name)))
        else:
            data = memoryview(bytes(source.read(name)))
        self.checked.require_same(source.made_from(name))
        return data

    def _quantized(
        self, matrix: StoredMatrix, weight_format: WeightFormat, module: str, leaf: str
    ) -> dict[str, Tensor]:
        """The weight or the block scales of a module; the scales beside the weight where they come after it
        in a shard, in which wide dtypes come first.
        """
        solved = self.ingredients.solved
        rounded = solved.rounded(module, leaf) if solved is not None else None
        if rounded is not None:
            made_from = self.ingredients.source.made_from(matrix.tensor)
            self.checked.require_same(made_from, matrix.expert)
            return {f"{module}.{leaf}": rounded}
        weight = self._weight(module, matrix)
        block_amax = solved.block_amax(module) if solved is not None else None
        if module in self.ingredients.cast:
            block_amax = kept_block_amax(self.ingredients.source, matrix, weight_format)
        tensor_scale = self.ingredients.scales.get(f"{module}.{weight_format.tensor_leaf}")
        scale = weight_format.block_scale(weight, tensor_scale, block_amax)
        made = {} if scale is None else {f"{module}.weight_scale": scale}
        if leaf == "weight":
            packed = weight_format.pack(weight, tensor_scale, scale)
            later = scale is not None and scale.element_size() == packed.element_size()
            made = {f"{module}.weight": packed} | (made if later else {})
        return made

    def _weight(self, module: str, matrix: StoredMatrix) -> Tensor:
        """The weight as it is to be packed."""
        name, given = f"{module}.weight", self.ingredients
        stored_weight = matrix.read(given.source)
        self.checked.require_same(given.source.made_from(matrix.tensor), matrix.expert)
        weight = stored_weight.to(given.rescaling.dtype)
        largest = largest_magnitude(weight.reshape(-1))
        recorded = given.weight_amax[module]
        if not bool(largest.isfinite()):
            raise InputError(f"{name} holds values that are not finite; repair the source checkpoint")
        if largest > recorded:
            raise InputError(
                f"{name} reaches {largest.item():g} but the run's weight amax is {recorded.item():g}; "
                "the run was captured from other weights: give those as --model"
            )
        return given.rescaling.to_pack(module, weight)
