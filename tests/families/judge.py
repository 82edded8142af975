"""Judges an export by the writer's weights and an own forward: every fault is a sentence."""

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.families.checkpoint import Checkpoint
from tests.families.expected import Matrix, matrices, unbuilt
from tests.families.layout import Family
from tests.families.replay import LAYER, Seen

LARGEST = {torch.uint8: 6.0 * 448.0, torch.float8_e4m3fn: 448.0}
ROUNDING = {torch.uint8: 0.125, torch.float8_e4m3fn: 0.0625}
"""The largest relative error (Frobenius) of rounding to nearest: random matrices have 0.095 and 0.026, and
half a step of e4m3 is never more than 1 / 16."""

SOLVED = 0.45
"""The same for weights that a solver changed on purpose, after rows and columns are scaled back."""

AGREEMENT = 1e-6

MOVED = 1.6
"""How far the largest inputs of a quantized model may lie from those of its source, as a factor."""


@dataclass(frozen=True)
class Asked:
    """What a recipe asks for. `solved`: weights that a solver chose; `folded`: scales of inputs moved into
    what comes before; `kv`: scales for K and V."""

    solved: bool = False
    folded: bool = False
    kv: bool = False


@dataclass(frozen=True)
class Case:
    """What there is to judge by: the family, its weights' meaning, the source folder and the own forward."""

    family: Family
    weights: dict[str, torch.Tensor]
    source: Path
    seen: Seen


def faults(case: Case, export: Checkpoint, asked: Asked) -> list[str]:
    """All that is wrong with an export, for what its recipe asks for."""
    return [
        *weight_faults(case, export, asked),
        *input_faults(case, export, asked),
        *kv_faults(case, export, asked),
        *leftover_faults(export),
        *group_faults(case, export),
        *exclude_faults(case, export),
        *config_faults(case, export),
        *file_faults(case, export),
    ]


def weight_faults(case: Case, export: Checkpoint, asked: Asked) -> Iterator[str]:
    """Missing tensors, unquantized ones that differ, and quantized ones further off than their format."""
    found = matrices(case.family, case.weights)
    for name, value in case.weights.items():
        kept = export.tensors.get(name)
        if kept is not None and kept.dtype not in LARGEST:
            export.used.add(name)
            same = kept.dtype == value.dtype and kept.shape == value.shape and torch.equal(kept, value)
            if not same and not (asked.folded and may_be_folded(case, name, kept)):
                yield f"{name} is not the source's"
            continue
        if name not in found:
            yield f"{name} is missing"
            continue
        if unbuilt(case.family, name) and not quantized_beside(case, export, name):
            yield f"{name}, which no class builds, is not carried as it is"
            continue
        for matrix in found[name]:
            yield from _quantized_faults(matrix, export, asked)


def may_be_folded(case: Case, name: str, kept: torch.Tensor) -> bool:
    """Whether folding may change this tensor: a norm, a bias, or a linear left unquantized that reads a
    norm."""
    tensor = case.family.layout.tensors[name]
    if unbuilt(case.family, name) or kept.shape != tensor.shape or not torch.isfinite(kept).all():
        return False
    return tensor.kind in ("norm", "vector", "linear")


def _quantized_faults(matrix: Matrix, export: Checkpoint, asked: Asked) -> Iterator[str]:
    name = export.weight_name(matrix.module)
    if name is None:
        yield f"{matrix.module} is missing"
        return
    if not export.quantized(matrix.module):
        export.used.add(name)
        kept = export.tensors[name]
        if not asked.folded and not (kept.dtype == matrix.value.dtype and torch.equal(kept, matrix.value)):
            yield f"{matrix.module} is neither quantized nor the source's"
        return
    second = export.scale(matrix.module, "weight_scale_2")
    if second is not None and second.numel() != 1:
        yield f"{matrix.module} has {second.numel()} scales for the whole tensor"
        return
    values = export.values(matrix.module, matrix.transposed)
    wanted = matrix.value.float()
    if values.shape != wanted.shape:
        yield f"{matrix.module} has shape {tuple(values.shape)}, not {tuple(wanted.shape)}"
        return
    if asked.folded:
        values = scaled_back(values, wanted)
    bound = SOLVED if asked.solved else ROUNDING[export.tensors[name].dtype]
    error = float((values - wanted).norm() / wanted.norm())
    if not error <= bound:
        yield f"{matrix.module} is off by {error:.3f}"


def scaled_back(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The values with rows and columns scaled to lie closest to what is wanted, as folding scaled them."""
    for _ in range(4):
        for axis in (-2, -1):
            scale = (values * wanted).sum(axis, keepdim=True) / (values * values).sum(
                axis, keepdim=True
            ).clamp(min=1e-12)
            values = values * scale
    return values


def input_faults(case: Case, export: Checkpoint, asked: Asked) -> Iterator[str]:
    """Input scales that are not an own forward's: the module's, or the largest of its layer's experts. Where
    scales are folded the inputs are others; they are only positive and finite then."""
    for found in matrices(case.family, case.weights).values():
        for matrix in found:
            scale = export.scale(matrix.module, "input_scale")
            if not export.quantized(matrix.module):
                if scale is not None:
                    yield f"{matrix.module} is unquantized and has an input scale"
                continue
            if scale is None:
                yield f"{matrix.module} has no input scale"
                continue
            if scale.numel() != 1 or not torch.isfinite(scale).all() or not (scale > 0).all():
                yield f"{matrix.module} has the input scale {scale.flatten()[:3].tolist()}"
                continue
            if asked.folded:
                continue
            stored = export.tensors[export.weight_name(matrix.module) or ""].dtype
            allowed = input_candidates(case.seen, matrix.module)
            amax = float(scale) * LARGEST[stored]
            if not any(abs(amax - one) <= AGREEMENT * one for one in allowed):
                yield f"{matrix.module} has the input amax {amax:.6g}, not {allowed}"


def input_candidates(seen: Seen, module: str) -> list[float]:
    """What an input's largest value may be: the module's own, or its layer's over all experts. A module that
    no class builds has those of the linears that engines fuse it with."""
    if module not in seen.inputs:
        beside = [member for members in siblings(module, set(seen.inputs)) for member in members]
        found = [seen.inputs[member] for member in beside]
    else:
        found = [seen.inputs[module]]
    pattern = re.sub(r"experts\\\.\d+\\\.", r"experts\\.\\d+\\.", re.escape(module))
    layer = [value for name, value in seen.inputs.items() if re.fullmatch(pattern, name)]
    return found + ([max(layer)] if layer else [])


def folded_input_faults(case: Case, export: Checkpoint, seen: Seen) -> Iterator[str]:
    """Input scales that have nothing to do with what the folded model's inputs are; `seen` is an own forward
    of the export's weights, whose rounding moves inputs a little."""
    for found in matrices(case.family, case.weights).values():
        for matrix in found:
            scale = export.scale(matrix.module, "input_scale")
            if scale is None or not export.quantized(matrix.module):
                continue
            allowed = input_candidates(seen, matrix.module)
            amax = float(scale) * LARGEST[export.tensors[export.weight_name(matrix.module) or ""].dtype]
            if allowed and not any(one / MOVED <= amax <= one * MOVED for one in allowed):
                yield f"{matrix.module} has the input amax {amax:.4g}, folded it sees {allowed}"


def kv_faults(case: Case, export: Checkpoint, asked: Asked) -> Iterator[str]:
    """K and V scales that are missing, or not an own forward's."""
    layers = {"k": set[int](), "v": set[int]()}
    for name, scale in export.tensors.items():
        if not name.endswith((".k_scale", ".v_scale")):
            continue
        export.used.add(name)
        which, number = name[-7], LAYER.search(name)
        seen = case.seen.keys if which == "k" else case.seen.values
        if not asked.kv or number is None or int(number[1]) not in seen:
            yield f"{name} is not asked for"
            continue
        layers[which].add(int(number[1]))
        amax = float(scale) * 448.0
        if abs(amax - seen[int(number[1])]) > AGREEMENT * amax:
            yield f"{name} stands for {amax:.6g}, not {seen[int(number[1])]:.6g}"
    if asked.kv:
        for which, own in (("k", case.seen.keys), ("v", case.seen.values)):
            for layer in sorted(set(own) - layers[which]):
                yield f"layer {layer} has no {which}_scale"


def leftover_faults(export: Checkpoint) -> Iterator[str]:
    """Tensors that nothing of the source stands for."""
    for name in sorted(set(export.tensors) - export.used):
        yield f"{name} is extra"


GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that engines hold in one matrix, by the last part of their names."""


def group_faults(case: Case, export: Checkpoint) -> Iterator[str]:
    """Linears that engines fuse and that are quantized in part, or with scales that differ."""
    modules = {matrix.module for found in matrices(case.family, case.weights).values() for matrix in found}
    for first in sorted(modules):
        for members in siblings(first, modules):
            if members[0] != first:
                continue
            quantized = [module for module in members if export.quantized(module)]
            if quantized and len(quantized) != len(members):
                yield f"of {', '.join(members)} only {', '.join(quantized)} is quantized"
                continue
            for which in ("weight_scale_2", "input_scale"):
                scales = {
                    float(scale) for one in quantized if (scale := export.scale(one, which)) is not None
                }
                if len(scales) > 1:
                    yield f"{', '.join(members)} have different {which}"


def siblings(module: str, modules: set[str]) -> Iterator[list[str]]:
    """The fused groups that a module belongs to: those of its members that exist."""
    parent, _, last = module.rpartition(".")
    for group in GROUPS:
        if last in group:
            yield [member for name in group if (member := f"{parent}.{name}") in modules]


def quantized_beside(case: Case, export: Checkpoint, name: str) -> bool:
    """Whether a tensor that no class builds belongs to a fused group whose built members are quantized."""
    modules = {name.removesuffix(".weight") for name in case.weights}
    return any(
        export.quantized(member) and not unbuilt(case.family, f"{member}.weight")
        for members in siblings(name.removesuffix(".weight"), modules)
        for member in members
    )


def exclude_faults(case: Case, export: Checkpoint) -> Iterator[str]:
    """Matrices left unquantized that no pattern names, and quantized ones that one does (vLLM takes a part of
    a name for a match)."""
    inline = export.config.get("quantization_config", {}).get("ignore")
    if inline is not None and sorted(inline) != sorted(export.exclude):
        yield "config.json and hf_quant_config.json exclude different modules"
    for name, found in matrices(case.family, case.weights).items():
        whole = name in export.tensors and export.tensors[name].dtype not in LARGEST
        for module in {engine_module(case, name)} if whole else {matrix.module for matrix in found}:
            if not export.quantized(module) and not named(module, export.exclude):
                yield f"{module} is unquantized and not excluded"
            hit = [pattern for pattern in export.exclude if pattern in module or named(module, [pattern])]
            if export.quantized(module) and hit:
                yield f"{module} is quantized and excluded by {hit[0]}"


def named(module: str, patterns: list[str]) -> bool:
    """Whether a pattern names the module."""
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def engine_module(case: Case, name: str) -> str:
    """The module an engine asks its list about: for experts in one tensor it is all of them."""
    if case.family.layout.tensors[name].kind == "experts":
        return name.rpartition(".")[0]
    return name.removesuffix(".weight")


def config_faults(case: Case, export: Checkpoint) -> Iterator[str]:
    """Keys of the source's config.json that are lost or changed."""
    yield from _changed_keys(case.family.config, export.config, "")


def _changed_keys(source: dict[str, object], now: dict[str, object], where: str) -> Iterator[str]:
    for key, value in source.items():
        if key == "quantization_config":
            continue
        there = now.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            yield from _changed_keys(value, there, f"{where}{key}.")
        elif key not in now or there != value:
            yield f"config.json: {where}{key} was {value!r}, is {there!r}"
    for key, value in now.items():
        if key.endswith("_config") and isinstance(value, dict) and "quantization_config" in value:
            yield f"config.json: {where}{key} keeps a quantization_config"


def file_faults(case: Case, export: Checkpoint) -> Iterator[str]:
    """Small files of the source that are lost or changed."""
    for file in sorted(case.source.iterdir()):
        if file.suffix == ".safetensors" or file.name == "config.json":
            continue
        there = export.folder / file.name
        if not there.is_file() or there.read_bytes() != file.read_bytes():
            yield f"{file.name} is not carried"
