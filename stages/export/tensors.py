"""Output tensors, one at a time: read from the source, checked against the run's identity, packed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.export.decide import Decisions
from stages.export.identity import refuse_other_tensors
from stages.export.pack import pack_fp8, pack_nvfp4, raw_bytes
from stages.export.plan import Shard, Unit
from stages.export.scales import stored
from stages.export.shards import Bytes, TensorSpec
from stages.weights import largest_magnitude, read_tensor
from state.errors import InputError
from state.source import Source


class TensorMaker:
    """Makes the bytes of a shard's tensors. Holds one packed weight at most.

    dtype: what a weight is cast to before it is packed, the dtype the model computes in.
    """

    def __init__(
        self,
        source: Source,
        digests: Mapping[str, str],
        decisions: Decisions,
        shard: Shard,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.digests, self.decisions, self.dtype = source, digests, decisions, dtype
        self.unit_of = {spec.name: unit for unit in shard.units for spec in unit.outputs}
        self.pending: dict[str, Tensor] = {}

    def make(self, spec: TensorSpec) -> Bytes:
        """The bytes of one output tensor.

        Raises IdentityMismatch when the source tensor is not the one the run was calibrated with, naming
        every such tensor, and InputError for a weight that is not finite or exceeds the amax the run holds
        for it.
        """
        unit = self.unit_of[spec.name]
        if unit.source is None or spec.name in self.decisions.scales:
            return stored(self.decisions.scales[spec.name])
        if unit.format is None:
            self._check(unit.source)
            return self.source.read(unit.source)
        if spec.name not in self.pending:
            self._check(unit.source)
            self.pending = self._pack(unit)
        return raw_bytes(self.pending.pop(spec.name))

    def _check(self, name: str) -> None:
        found = self.source.digest(name)
        if found != self.digests.get(name):
            refuse_other_tensors(self.source, self.digests, self.source.digests(threads=2) | {name: found})

    def _pack(self, unit: Unit) -> dict[str, Tensor]:
        assert unit.source is not None and unit.format is not None
        module = unit.source.removesuffix(".weight")
        weight = read_tensor(self.source, unit.source).to(self.dtype)
        largest = largest_magnitude(weight.reshape(-1))
        recorded = self.decisions.weight_amax[module]
        if not bool(largest.isfinite()):
            raise InputError(f"{unit.source} holds values that are not finite; repair the source checkpoint")
        if largest > recorded:
            raise InputError(
                f"{unit.source} reaches {largest.item():g} but the run's weight amax is {recorded.item():g}; "
                "the run was captured from other weights: give those as --model"
            )
        if unit.format.format == "fp8":
            return {unit.source: pack_fp8(weight, self.decisions.scales[f"{module}.weight_scale"])}
        scale_2 = self.decisions.scales[f"{module}.weight_scale_2"]
        packed, scale = pack_nvfp4(weight, scale_2, unit.format.block_size)
        return {unit.source: packed, f"{module}.weight_scale": scale}
