"""The parts of each decoder layer that folding is about, from what the probe saw."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from stages.calibrate.observe.relations import Probe
from stages.fold.candidates import LayerParts
from stages.fold.folds import Operand
from stages.model.skeleton import Skeleton
from state.layout import Relation
from state.names import has_expert, join_name, split_name
from state.source import TensorEntry


def layer_parts(
    skeleton: Skeleton, found: Probe, relations: Iterable[Relation], tensors: Mapping[str, TensorEntry]
) -> dict[int, LayerParts]:
    """Decoder layer → its parts, for every layer in which the probe saw anything.

    relations: of any kind; those of kind `norm_consumers` are used.
    """
    operands: dict[int, dict[str, Operand]] = defaultdict(dict)
    for module in _called(skeleton, found):
        layer, operand = split_name(module)[1], _operand(skeleton, module, tensors)
        if layer is not None and operand is not None:
            operands[layer].setdefault(module, operand)
    patterns: dict[int, dict[str, list[str]]] = {layer: _by_pattern(own) for layer, own in operands.items()}
    norms: dict[int, dict[str, Sequence[str]]] = defaultdict(dict)
    for relation in relations:
        for layer in relation.layers if relation.kind == "norm_consumers" else ():
            members = [
                module
                for name in relation.members
                for module in patterns.get(layer, {}).get(name, [_first(name, layer)])
            ]
            norm = join_name(relation.norm or "", layer)
            norms[layer][norm] = (*norms[layer].get(norm, ()), *members)
    values: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    for attention, (_, channels) in found.kv_channels.items():
        layer = split_name(attention)[1]
        if layer is not None:
            values[layer][attention] = channels, found.value_heads[attention]
    reads = {name: tensor for name, tensor, _ in found.inputs}
    shapes: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, entry in tensors.items():
        layer = split_name(name)[1]
        if layer in operands and len(entry.shape) == 1:
            shapes[layer][name] = tuple(entry.shape)
    return {
        layer: LayerParts(own, norms[layer], values[layer], reads, shapes[layer])
        for layer, own in operands.items()
    }


def _called(skeleton: Skeleton, found: Probe) -> Iterable[str]:
    """Every module that multiplied, in the order of the calls, experts one by one."""
    experts = {module.hub: module for module in skeleton.experts}
    for name, _, _ in found.inputs:
        if name not in experts:
            yield name
            continue
        for number in range(experts[name].count):
            yield from experts[name].projections(number)


def _operand(skeleton: Skeleton, module: str, tensors: Mapping[str, TensorEntry]) -> Operand | None:
    """The operand that a module's matrix is; None where the checkpoint has none."""
    matrix = skeleton.matrix(module)
    if matrix.tensor not in tensors:
        return None
    shape = tuple(tensors[matrix.tensor].shape)
    if matrix.count is None:
        return Operand(module, matrix.tensor, shape, matrix.expert, matrix.transposed)
    # One after the other in one period over all rows, or in turns in periods of as many rows as there are.
    period = matrix.stride if matrix.stride > 1 else shape[-1 if matrix.transposed else -2]
    return Operand(module, matrix.tensor, shape, matrix.expert, matrix.transposed, period, matrix.first)


def _by_pattern(modules: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        found[split_name(module)[0]].append(module)
    return found


def _first(pattern: str, layer: int) -> str:
    return join_name(pattern, layer, 0 if has_expert(pattern) else None)
