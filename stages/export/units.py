"""The export plan: every output tensor, what it is made from, and its shard; complete before the first byte.

Pure: it sees names, dtypes and shapes, never a value.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from stages.engines.kv import kv_scale_names
from stages.export.shards import TensorSpec
from stages.formats import StoredTensor, WeightFormat
from stages.model.matrices import StoredMatrix
from stages.recipe.exportable import require_exportable
from stages.recipe.quantizer_plan import QuantizerPlan
from state.errors import InputError
from state.source import TensorEntry


@dataclass(frozen=True)
class Unit:
    """Output tensors that are made together and so share a shard.

    source: the hub tensor that passes through unchanged, None for weights and KV scales. matrices, format: of
    a weight, module → what it is made from, and what it becomes; several modules where experts stay together.
    leaves: of a weight, output tensor → the leaf that it is (`weight`, `weight_scale`, ...).
    """

    name: str
    source: str | None
    outputs: tuple[TensorSpec, ...]
    matrices: Mapping[str, StoredMatrix] = field(default_factory=dict)
    format: WeightFormat | None = None
    leaves: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One safetensors file, named before any is written."""

    file: str
    units: tuple[Unit, ...]

    @property
    def specs(self) -> list[TensorSpec]:
        return [spec for unit in self.units for spec in unit.outputs]

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)


def plan_units(
    tensors: Mapping[str, TensorEntry],
    quantizers: QuantizerPlan,
    matrices: Mapping[str, StoredMatrix],
    weights_only: Iterable[str] = (),
    pre_quant_scale: Container[str] = (),
    dtype: str = "BF16",
) -> list[Unit]:
    """What becomes of every source tensor, in natural order of names; then the KV scales of each attention.

    Args:
        tensors: the source, by hub name.
        matrices: where the weight of each quantized module lies in it.
        weights_only: modules whose input scale a policy leaves out.
        pre_quant_scale: modules that a vector of this name is stored for, in `dtype`.
    Raises InputError naming the tensor for a weight that is missing, or of a dtype or shape its format can't
    take.
    """
    without_input = set(weights_only)
    modules_of: dict[str, list[str]] = {}
    for module in sorted(quantizers.weights, key=natural):
        modules_of.setdefault(matrices[module].tensor, []).append(module)
    require_exportable(quantizers, matrices, tensors)
    units = []
    for name in sorted(tensors, key=natural):
        entry = tensors[name]
        if name not in modules_of:
            units.append(Unit(name, name, (TensorSpec(name, entry.dtype, entry.shape),)))
        for members in _members(modules_of.get(name, ()), quantizers):
            parts = {module: matrices[module] for module in members}
            module, matrix = members[0], parts[members[0]]
            found = _stored(quantizers.weights[module], matrix, tensors, module in quantizers.together)
            if module in quantizers.inputs and not without_input.issuperset(members):
                found.append(StoredTensor("input_scale", "F32", ()))
            if module in pre_quant_scale:
                found.append(StoredTensor("pre_quant_scale", dtype, matrix.shape(tensors)[1:]))
            leaves = {quantizers.output(module, leaf): leaf for leaf, _, _ in found}
            specs = tuple(TensorSpec(quantizers.output(module, one.leaf), *one[1:]) for one in found)
            weight = quantizers.output(module, "weight")
            units.append(Unit(weight, None, specs, parts, quantizers.weights[module], leaves))
    for attention in sorted(quantizers.kv, key=natural):
        specs = tuple(TensorSpec(name, "F32", ()) for name in kv_scale_names(attention))
        units.append(Unit(f"{attention}.kv", None, specs))
    _refuse_duplicates(units)
    return units


def assign_shards(units: Sequence[Unit], shard_size: int) -> list[Shard]:
    """Fill shards with units in order; one closes when the next would take it past `shard_size` bytes."""
    filled: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not filled or unit.nbytes > room:
            filled.append([])
            room = shard_size
        filled[-1].append(unit)
        room -= unit.nbytes
    if len(filled) == 1:
        return [Shard("model.safetensors", tuple(filled[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(filled):05d}.safetensors", tuple(members))
        for number, members in enumerate(filled, start=1)
    ]


def check_engine_rules(
    quantizers: QuantizerPlan, engine_fused: Sequence[Sequence[str]], tensors: Mapping[str, TensorEntry]
) -> None:
    """Refuse what serving engines refuse.

    Raises InputError where a group that engines run as one matrix (q/k/v, gate/up) is not quantized in one
    format as a whole, and where an unquantized lm_head is not on the list of modules to leave alone. Mixed
    checkpoints have no such list, but one of what is quantized.
    """
    for group in engine_fused:
        formats = {
            module: quantizers.weights.get(module)
            for module in group
            if module in quantizers.weights or f"{module}.weight" in tensors
        }
        if len(set(formats.values())) > 1:
            shown = ", ".join(
                f"{name} {entry.name if entry else 'unquantized'}" for name, entry in formats.items()
            )
            raise InputError(
                f"recipe {quantizers.recipe.name!r} treats members of one fused group differently ({shown}); "
                "engines load such a group as one matrix: quantize all of it in one format, or none"
            )
    quantization = quantizers.hf_quant_config.get("quantization", {})
    if "quantized_layers" in quantization:
        return
    ignored = quantization.get("exclude_modules", [])
    for name in tensors:
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] != "lm_head" or name == module or module in quantizers.weights:
            continue
        if quantizers.weights and not any(fnmatchcase(module, pattern) for pattern in ignored):
            raise InputError(
                f"{module} stays unquantized but is not on the recipe's list of excluded modules"
            )


def check_widths(
    widths: Mapping[str, int], matrices: Mapping[str, StoredMatrix], tensors: Mapping[str, TensorEntry]
) -> None:
    """Raise InputError where a module was observed with another number of channels than its weight has."""
    for module, width in widths.items():
        columns = matrices[module].shape(tensors)[1]
        if width != columns:
            raise InputError(
                f"{module}: the run observed {width} input channels, its weight has {columns}; "
                "the run is of another model"
            )


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _members(modules: Sequence[str], quantizers: QuantizerPlan) -> list[tuple[str, ...]]:
    """The modules of one hub tensor by the output that holds them: each its own, or experts together."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(quantizers.output(module, "weight"), []).append(module)
    return [tuple(members) for members in found.values()]


def _stored(
    weight: WeightFormat, matrix: StoredMatrix, tensors: Mapping[str, TensorEntry], together: bool
) -> list[StoredTensor]:
    """What a format stores of a matrix; or of all experts' together, which keep the axes of their tensor."""
    if not together:
        return weight.stored(*matrix.shape(tensors))
    experts = tensors[matrix.tensor].shape[0]
    rows, columns = StoredMatrix(matrix.tensor, 0, matrix.transposed).shape(tensors)
    return [
        one._replace(shape=(experts, *one.shape[:: -1 if matrix.transposed else 1])) if one.shape else one
        for one in weight.stored(rows, columns)
    ]


def _refuse_duplicates(units: Sequence[Unit]) -> None:
    names = [spec.name for unit in units for spec in unit.outputs]
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the source already holds {double}, which this export has to write")
