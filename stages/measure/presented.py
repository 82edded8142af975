"""A quantized checkpoint as plain tensors under its source's names, dequantized as they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stages.engines.algos import AWQ_SCALE
from stages.engines.modules import Inventory, Quantized
from stages.model.matrices import StoredMatrix
from stages.model.raw import raw_bytes
from stages.model.skeleton import Skeleton
from stages.model.weights import TORCH_DTYPES, map_tensor
from stages.verify.dequantize import dequantized
from state.durable import Bytes
from state.errors import InputError
from state.source import Source


@dataclass(frozen=True)
class PresentedCheckpoint(Source):
    """The tensors of a checkpoint as its source has them: names, shapes and dtypes are the source's. A class
    that loads the one loads the other.

    held: the checkpoint. made: source tensor → the quantized modules that it is made of, and where each lies
    in it; those that are in none are in the checkpoint as they are.
    """

    held: Source = field(kw_only=True)
    made: Mapping[str, Mapping[str, tuple[Quantized, StoredMatrix]]] = field(kw_only=True)

    def read(self, name: str) -> memoryview:
        return self.private(name)

    def private(self, name: str, index: int | None = None) -> memoryview:
        whole = self.value(name)
        return raw_bytes(whole if index is None else whole[index].contiguous())

    def value(self, name: str) -> Tensor:
        """A tensor in the source's shape and dtype."""
        entry = self.tensors[name]
        if name not in self.made:
            held = map_tensor(self.held, name)
            return held.to(TORCH_DTYPES[entry.dtype]) if entry.dtype in TORCH_DTYPES else held
        whole = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        for module, matrix in self.made[name].values():
            matrix.place(whole).copy_(self._weight(module, matrix))
        return whole

    def _weight(self, module: Quantized, matrix: StoredMatrix) -> Tensor:
        """f32 `[rows, columns]`, as it is multiplied with the module's own input."""
        algo, sizes = module.algo, module.sizes
        assert algo is not None and sizes is not None
        stored = {leaf: map_tensor(self.held, entry.name) for leaf, entry in module.tensors.items()}
        if module.together:
            stored = {
                leaf: (values[matrix.expert].mT if module.transposed else values[matrix.expert])
                if values.dim() == 3
                else values
                for leaf, values in stored.items()
            }
        weight = dequantized(algo, stored, slice(0, sizes[0]))
        scale = stored.get(AWQ_SCALE)
        return weight if scale is None else weight * scale.float()

    def require_digested(self, name: str, data: Bytes) -> None:
        """Nothing was digested."""

    def require_unchanged(self) -> None:
        self.held.require_unchanged()


def present(
    checkpoint: Source, inventory: Inventory, source: Source, skeleton: Skeleton
) -> PresentedCheckpoint:
    """The checkpoint under the names of its source, of which `skeleton` is the model.

    Raises InputError naming a tensor of the source that it does not hold.
    """
    made: dict[str, dict[str, tuple[Quantized, StoredMatrix]]] = {}
    for module in inventory.quantized.values():
        if module.together:
            matrices = {
                f"{module.name}[{number}]": StoredMatrix(module.name, number, module.transposed)
                for number in range(module.codes.shape[0])
            }
        else:
            matrices = {module.name: skeleton.matrix(module.name)}
        for name, matrix in matrices.items():
            made.setdefault(matrix.tensor, {})[name] = (module, matrix)
    tensors = {
        name: replace(entry, file=checkpoint.tensors[name].file if name in checkpoint.tensors else entry.file)
        for name, entry in source.tensors.items()
        if name in made or name in checkpoint.tensors
    }
    return PresentedCheckpoint(checkpoint.folder, tensors, checkpoint.files, held=checkpoint, made=made)


def require_whole(presented: PresentedCheckpoint, skeleton: Skeleton) -> None:
    """Raise InputError where the model needs a tensor that the checkpoint does not have."""
    missing = sorted(skeleton.parameter_of.keys() - presented.tensors.keys())
    if missing:
        raise InputError(
            f"the checkpoint lacks {missing[0]} ({len(missing)} such), so that it computes nothing"
        )
