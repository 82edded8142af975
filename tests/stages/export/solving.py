"""Solutions made by hand: the solvers' own maths on small models, written to a run as calibration does."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.fold.folds import FoldMap, fold_norm
from stages.fold.sites import fold_map
from stages.formats import FP8, WeightFormat
from stages.formats.quantized import Quantized, quantize, round_to_nearest
from stages.formats.weight_format import tensor_amax
from stages.model.skeleton import Skeleton, load_config
from stages.model.text_model import TextModel
from stages.model.weights import read_tensor
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.quantizers import plan_quantizers
from stages.recipe.recipes import Recipe
from stages.recipe.solvers import Solver, array_name, solver_of
from stages.solve import gptq
from stages.unify import connected
from state.claim import create_run
from state.names import split_name
from state.reader import open_run
from state.source import Source
from state.update import Solution, Update

CLIP = 0.8


@dataclass(frozen=True)
class Model:
    """A model folder, and what a recipe does to it."""

    source: Source
    skeleton: Skeleton
    quantizers: QuantizerPlan
    solver: Solver
    folds: FoldMap


@dataclass(frozen=True)
class HandSolved:
    """run: with the solutions. weights: quantized module → its dequantized weight, as the solver has it."""

    run: Path
    weights: dict[str, Tensor]


def open_model(folder: Path, run: Path, recipe: Recipe) -> Model:
    source, config = Source.open(folder), load_config(folder)
    skeleton = Skeleton(config, source.tensors)
    quantizers = plan_quantizers(skeleton, recipe)
    solver = solver_of(quantizers)
    assert solver is not None
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    folds = fold_map(shapes, TextModel.of(skeleton.config), open_run(run).layout.relations)
    return Model(source, skeleton, quantizers, solver, folds)


def random_scales(model: Model) -> dict[str, Tensor]:
    """Scales from a half to two, those of norms snapped to what the norm can hold."""
    generator = torch.Generator().manual_seed(0)
    scales = {}
    for name, site in model.folds.sites.items():
        scale = torch.exp2(2 * torch.rand(site.channels, generator=generator) - 1)
        if site.kind == "norm":
            scale = fold_norm(read_tensor(model.source, site.sources[0].tensor), scale, site.plus_one)[1]
        scales[name] = scale
    return scales


def hand_solve(folder: Path, run: Path, out: Path, recipe: Recipe, per_block: bool = False) -> HandSolved:
    """Solve every layer of a run, with random scales where the recipe has any, and write it to `out`."""
    model = open_model(folder, run, recipe)
    solver, stored = model.solver, open_run(run)
    scales = random_scales(model) if solver.method in ("awq_lite", "awq_full") or solver.awq_first else {}
    fields = {(name, "scale"): scale for name, scale in scales.items()}
    groups = [*stored.layout.groups("same_input"), *stored.layout.groups("engine_fused")]
    weights: dict[str, Tensor] = {}
    for group in dict.fromkeys(connected(model.quantizers.weights, groups).values()):
        parts = [folded_weight(model, module, scales) for module in group]
        weight_format = model.quantizers.weights[group[0]]
        quantized, amax, clipped = _solve(torch.cat(parts)[None], weight_format, solver, per_block)
        ends = np.cumsum([len(part) for part in parts])
        for module, part, end in zip(group, parts, ends, strict=True):
            rows = slice(end - len(part), end)
            weights[module] = quantized.dequantize()[0, rows]
            fields[module, "weight_amax"] = amax
            if clipped is not None:
                fields[module, "amax"] = clipped[0, rows]
            if solver.method == "gptq":
                scale = quantized.scale if weight_format == FP8 else quantized.scale[:, rows]
                member = replace(quantized, values=quantized.values[:, rows], scale=scale)
                for field, values in member.encoded().items():
                    fields[module, field] = values[0]
    kept = dict.fromkeys(model.folds.impossible, "no reason")
    attributes = {
        "method": solver.method,
        "policies": [{"policy": "layer-average", "modules": [group[0]]}],
        "kept_at_one": kept,
    }
    write_solutions(run, out, solver.id, fields, attributes)
    return HandSolved(out, weights)


def folded_weight(model: Model, module: str, scales: dict[str, Tensor]) -> Tensor:
    stored = read_tensor(model.source, f"{module}.weight")
    fold = model.folds.tensor_fold(f"{module}.weight", scales)
    return stored.float() if fold is None else fold.apply(stored)


def write_solutions(
    run: Path, out: Path, solver_id: str, fields: dict[tuple[str, str], Tensor], attributes: dict[str, object]
) -> None:
    """A copy of a run with one solution per layer: (module or site, field) → tensor, experts stacked."""
    stacks: dict[int, dict[str, dict[int | None, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for (name, field), values in fields.items():
        layer = split_name(name)[1]
        assert layer is not None
        array, expert = array_name(name, field)
        stacks[layer][array][expert] = values
    solutions = []
    for layer, arrays in stacks.items():
        stacked = {
            name: parts[None] if None in parts else torch.stack([parts[expert] for expert in sorted(parts)])
            for name, parts in arrays.items()
        }
        held = {name: values.contiguous().numpy() for name, values in stacked.items()}
        solutions.append(Solution(solver_id, layer, held, attributes))
    stored = open_run(run)
    with create_run(out, stored.record, stored.tokens) as writer:
        writer.commit(Update(stored.head.cursor, True, stored.generation(), tuple(solutions)))


def _solve(
    weights: Tensor, weight_format: WeightFormat, solver: Solver, per_block: bool
) -> tuple[Quantized, Tensor, Tensor | None]:
    """Weights of one group `[1, N, K]` → quantized, amax of the tensor scale `[]`, of the blocks or None."""
    amax = tensor_amax(weights)
    if solver.method in ("awq_clip", "awq_full", "local_hessian") and per_block:
        own, shared = CLIP * weight_format.block_amax(weights), weight_format.search_scale(weights)
        scale = weight_format.scales_from_amax(own, shared)
        return quantize(weight_format, weights, scale, shared), amax.reshape(()), own
    if solver.method in ("awq_clip", "awq_full"):
        return round_to_nearest(weight_format, weights, CLIP * amax), (CLIP * amax).reshape(()), None
    if solver.method == "gptq":
        samples = torch.randn(64, weights.shape[-1], generator=torch.Generator().manual_seed(1))
        moment = (samples.T @ samples)[None]
        return gptq.solve(weights, moment, weight_format, amax=amax), amax.reshape(()), None
    return round_to_nearest(weight_format, weights, amax), amax.reshape(()), None
