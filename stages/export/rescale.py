"""What a solver's input scales change: weights, norms, routers, and the statistics of what reaches them.

Two ways. Folded: a scale goes into what stands before the weight (`fold.py`), and nothing is left for an
engine to apply. Separate: the weight's columns are multiplied and the input divided, as modelopt's exporter
has it: by the norm where quantized linears alone read it, elsewhere by the engine, from a `pre_quant_scale`
tensor. Pure functions over tensors in hub names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stages.export.observed import Observed, kv_quantizers
from stages.fold.folds import FoldMap, FoldSite, fold_norm
from stages.recipe.unified_inputs import input_quantizer
from state.errors import InputError


@dataclass(frozen=True)
class Rescaling:
    """The changes of one export. As it is made by default it changes nothing.

    Attributes:
        dtype: what the model computes in. Weights are cast to it before anything is done to them.
        exact: weights are packed from float32, as solvers do. Otherwise from `dtype`, as modelopt does.
        folds, scales: places to fold, and the scale folded into each: float32 `[channels]`, on the consumers'
            side.
        separate: module → float32 `[columns]`, what its input is multiplied by, and its columns divided by.
        written: modules of `separate` whose vector is stored as `pre_quant_scale`, in `dtype`.
        replaced: tensor → what is stored in its place (norms).
    """

    dtype: torch.dtype
    exact: bool = False
    folds: FoldMap = field(default_factory=FoldMap)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    separate: Mapping[str, Tensor] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    def to_pack(self, module: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weight `[out, in]` of a module, or some of its rows, as it is packed: float32 where `exact`,
        else `dtype`.
        """
        weight = stored.to(self.dtype)
        fold = self.folds.module_fold(module, self.scales)
        if fold is not None:
            weight = replace(fold, row=None if fold.row is None else fold.row[rows]).apply(weight)
        if module in self.separate:
            weight = (weight * (1.0 / self.separate[module])).to(self.dtype)
        return weight.float() if self.exact else weight

    def changes(self, tensor: str) -> bool:
        """Whether a tensor that is not quantized is stored with other values than the source's."""
        return tensor in self.replaced or self.folds.tensor_fold(tensor, self.scales) is not None

    def to_store(self, tensor: str, stored: Tensor) -> Tensor:
        """A tensor that is not quantized, in its own dtype."""
        if tensor in self.replaced:
            return self.replaced[tensor]
        fold = self.folds.tensor_fold(tensor, self.scales)
        return stored if fold is None else fold.apply(stored).to(stored.dtype)

    def pre_quant_scale(self, module: str) -> Tensor:
        """The stored vector of a module in `written`."""
        return self.separate[module].to(self.dtype)

    def adapt(self, found: Observed) -> Observed:
        """What would have been observed behind the scales.

        Raises InputError where a scale acts on statistics that are one number for all channels.
        """
        inputs = dict(found.inputs)
        for quantizer, amax in found.inputs.items():
            module = quantizer.removesuffix(input_quantizer(""))
            divisor = self.folds.input_factors(module, self.scales)
            if divisor is not None:
                inputs[quantizer] = _by_channel(quantizer, amax) / divisor
            if module in self.separate:
                # modelopt's order of operations and roundings: apply_pre_quant_scale_and_smooth.
                scaled = _by_channel(quantizer, amax).to(self.dtype) * self.separate[module]
                inputs[quantizer] = scaled.to(self.dtype).float()
        kv = dict(found.kv)
        for attention in self.folds.values:
            value_quantizer = kv_quantizers(attention)[1]
            divisor = self.folds.value_factors(attention, self.scales)
            if value_quantizer in kv and divisor is not None:
                kv[value_quantizer] = _by_channel(value_quantizer, kv[value_quantizer]) / divisor
        return replace(found, inputs=inputs, kv=kv)


def folded(
    dtype: torch.dtype, folds: FoldMap, scales: Mapping[str, Tensor], norms: Mapping[str, Tensor]
) -> Rescaling:
    """Fold every scale.

    Args:
        scales: site name → float32 `[channels]`.
        norms: norm weight → what the source stores, for the norms among the sites.
    Raises InputError for a scale that its norm can't hold exactly: solvers search under that constraint.
    """
    replaced = {}
    for name in scales:
        site = folds.sites[name]
        if site.kind != "norm":
            continue
        tensor = site.sources[0].tensor
        replaced[tensor], held = fold_norm(norms[tensor], scales[name], site.plus_one)
        if not held.equal(scales[name]):
            raise InputError(
                f"the solution's scale of {name} is not one that the norm can hold; it was made by another "
                "version: calibrate with this one into a new run"
            )
    return Rescaling(dtype, exact=True, folds=folds, scales=scales, replaced=replaced)


def kept_apart(
    dtype: torch.dtype,
    folds: FoldMap,
    scales: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    columns: Mapping[str, int],
    fused_experts: frozenset[str],
) -> Rescaling:
    """Keep every scale apart, as modelopt's exporter does.

    A norm that only quantized linears read is divided all the same; modelopt's `fuse_prequant_layernorm` is
    where its rounding comes from. A quantized module whose input can't be scaled gets a vector of ones, so
    that all of a checkpoint have the same tensors.

    Args:
        scales: site name → float32 `[channels]`.
        tensors: weight and bias of the norms among the sites, as the source stores them.
        columns: modules whose weights are quantized → their input channels.
    """
    modules = columns.keys()
    separate = {module: torch.ones(width) for module, width in columns.items()}
    replaced: dict[str, Tensor] = {}
    written = set(modules)
    for name, scale in scales.items():
        site = folds.sites[name]
        vector = 1.0 / site.expand(scale)
        readers = [part.module for part in site.consumers]
        separate.update((module, vector) for module in readers if module in modules)
        if site.kind == "norm" and modules >= set(readers) and fused_experts.isdisjoint(readers):
            replaced |= _divided_norm(site, tensors, vector.to(dtype))
            written.difference_update(readers)
    return Rescaling(dtype, separate=separate, written=frozenset(written), replaced=replaced)


def smoothed(dtype: torch.dtype, vectors: Mapping[str, Tensor]) -> Rescaling:
    """SmoothQuant: module → float32 `[columns]`, what its input is multiplied by; all of them stored."""
    return Rescaling(dtype, separate=vectors, written=frozenset(vectors))


def _divided_norm(site: FoldSite, tensors: Mapping[str, Tensor], vector: Tensor) -> dict[str, Tensor]:
    weight, *biases = (part.tensor for part in site.sources)
    stored = tensors[weight]
    product = (stored + 1.0) * vector - 1.0 if site.plus_one else stored * vector
    return {weight: product.to(stored.dtype)} | {
        bias: (tensors[bias] * vector).to(tensors[bias].dtype) for bias in biases
    }


def _by_channel(quantizer: str, amax: Tensor) -> Tensor:
    if amax.dim() != 1:
        raise InputError(
            f"{quantizer} holds one amax for all channels (the run was captured), but the recipe scales "
            "channel by channel; calibrate the model with `holdfast calibrate`"
        )
    return amax
