"""Output tensors, one at a time: read from the source, checked against the run's identity, packed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.export.cast import kept_block_amax
from stages.export.checked import CheckedSource
from stages.export.rescale import Rescaling
from stages.export.scales import stored, stored_vector
from stages.export.shards import Bytes, TensorSpec
from stages.export.solved import Solved
from stages.export.units import Shard, Unit
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
        leaf = unit.leaves[spec.name]  # KV scales are among the scales
        if leaf == "pre_quant_scale":
            (module,) = unit.matrices
            return stored_vector(given.rescaling.pre_quant_scale(module))
        if spec.name not in self.pending:
            self.pending = self._quantized(unit, leaf)
        return raw_bytes(self.pending.pop(spec.name))

    def _unquantized(self, name: str) -> Bytes:
        source, rescaling = self.ingredients.source, self.ingredients.rescaling
        if rescaling.changes(name):
            data = raw_bytes(rescaling.to_store(name, read_tensor(source, name)))
        else:
            data = memoryview(bytes(source.read(name)))
        self.checked.require_same(source.made_from(name))
        return data

    def _quantized(self, unit: Unit, leaf: str) -> dict[str, Tensor]:
        """The weight or the block scales of a unit, by output; the scales beside the weight where they come
        after it in a shard, in which wide dtypes come first.
        """
        names = {which: name for name, which in unit.leaves.items()}
        if len(unit.matrices) == 1:
            (module,) = unit.matrices
            return {names[which]: values for which, values in self._packed(unit, module, leaf).items()}
        shapes = {spec.name: spec.shape for spec in unit.outputs}
        made: dict[str, Tensor] = {}
        tensors = sorted({matrix.tensor for matrix in unit.matrices.values()})
        made_from = [name for tensor in tensors for name in self.ingredients.source.made_from(tensor)]
        self.checked.require_same(made_from)
        for module, matrix in unit.matrices.items():
            for which, values in self._packed(unit, module, leaf).items():
                name = names[which]
                whole = made.setdefault(name, torch.empty(shapes[name], dtype=values.dtype))
                matrix.place(whole).copy_(values)
        self.checked.require_same(made_from)
        return made

    def _packed(self, unit: Unit, module: str, leaf: str) -> dict[str, Tensor]:
        """What a module adds to the outputs of its unit, by leaf."""
        given, matrix, weight_format = self.ingredients, unit.matrices[module], unit.format
        assert weight_format is not None
        rounded = given.solved.rounded(module, leaf) if given.solved is not None else None
        if rounded is not None:
            self._require_same(unit, matrix)
            return {leaf: rounded}
        weight = self._weight(unit, module)
        block_amax = given.solved.block_amax(module) if given.solved is not None else None
        if module in given.cast:
            block_amax = kept_block_amax(given.source, matrix, weight_format)
        scaled = (name for name, which in unit.leaves.items() if which == weight_format.tensor_leaf)
        tensor_scale = given.scales.get(next(scaled, ""))
        scale = weight_format.block_scale(weight, tensor_scale, block_amax)
        made = {} if scale is None else {"weight_scale": scale}
        if leaf == "weight":
            if len(unit.matrices) > 1:  # as an expert in a tensor of experts
                blocks = None if scale is None else scale[None]
                packed = weight_format.pack(weight[None], tensor_scale, blocks)[0]
            else:
                packed = weight_format.pack(weight, tensor_scale, scale)
            later = scale is not None and scale.element_size() == packed.element_size()
            made = {"weight": packed} | (made if later else {})
        return made

    def _weight(self, unit: Unit, module: str) -> Tensor:
        """The weight as it is to be packed."""
        name, given, matrix = f"{module}.weight", self.ingredients, unit.matrices[module]
        stored_weight = matrix.read(given.source)
        self._require_same(unit, matrix)
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

    def _require_same(self, unit: Unit, matrix: StoredMatrix) -> None:
        """Compare what a matrix is made from; experts that stay together are compared as a whole, before the
        first and behind the last.
        """
        if len(unit.matrices) == 1:
            self.checked.require_same(self.ingredients.source.made_from(matrix.tensor), matrix.expert)
