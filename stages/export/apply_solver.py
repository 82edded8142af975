"""What a recipe's solver makes of one export: the rescaling, and the statistics behind it.

The maths is in `rescale.py`; here its inputs are read from the run and the source.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stages.export.observed import Observed
from stages.export.rescale import Rescaling, folded, kept_apart, smoothed
from stages.export.solved import Solved
from stages.fold.folds import FoldMap
from stages.fold.sites import fold_map
from stages.model.weights import largest_magnitude, read_tensor
from stages.recipe.model_plan import ModelPlan, Scales
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import Solver
from stages.recipe.unified_inputs import input_quantizer
from stages.settings import Fold
from stages.solve.smoothquant import pre_quant_scale
from stages.unify import PolicyUse, connected, merge
from state.errors import InputError
from state.names import split_name
from state.reader import Calibration
from state.source import Source

FUSED_EXPERTS = "modelopt does not smooth experts that the model class stores fused"


@dataclass(frozen=True)
class Subject:
    """What is exported: a run, the source it was calibrated from, and a recipe's plan for it."""

    run: Calibration
    source: Source
    plan: ModelPlan

    @property
    def quantizers(self) -> QuantizerPlan:
        return self.plan.quantizers

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return getattr(torch, self.plan.dtype)

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """`(out, in)` of a module's weight."""
        return self.plan.matrices[module].shape(self.source.tensors)


@dataclass(frozen=True)
class Applied:
    """A solver as it acts on one export; without one, nothing is rescaled.

    found: the observations as they are behind the scales. solved: its solutions, where it has any.
    kept_at_one: module or fold site whose input is not scaled → the reason.
    """

    found: Observed
    rescaling: Rescaling
    solved: Solved | None = None
    kept_at_one: Mapping[str, str] = field(default_factory=dict)

    @property
    def scales(self) -> Scales:
        """Where the solver's input scales are."""
        if self.solved is None:
            return "plain"
        return "separate" if self.rescaling.separate else "folded"

    @property
    def folds(self) -> dict[str, list[str]]:
        """Module that a scale was divided out of → the modules that took it in, by pattern."""
        if self.scales != "folded":
            return {}
        found: dict[str, dict[str, None]] = {}
        for name in self.rescaling.scales:
            site = self.rescaling.folds.sites[name]
            readers = found.setdefault(split_name(name)[0], {})
            readers.update((split_name(part.module)[0], None) for part in site.consumers)
        return {source: list(readers) for source, readers in sorted(found.items())}

    @property
    def policies(self) -> tuple[PolicyUse, ...]:
        """The policies that acted while solving."""
        return self.solved.policies if self.solved is not None else ()


def apply_solver(solver: Solver | None, subject: Subject, found: Observed, fold: Fold) -> Applied:
    """Apply a solver to observations.

    Raises InputError for solutions that are missing or don't fit, for observations without channels where
    channels are scaled, and where `fold="none"` can't be had.
    """
    if solver is None:
        return Applied(found, Rescaling(subject.dtype))
    if not solver.needs_pass:
        rescaling = _smoothquant(solver, subject, found)
        kept = dict.fromkeys(sorted(subject.quantizers.fused_experts), FUSED_EXPERTS)
        return Applied(rescaling.adapt(found), rescaling, kept_at_one=kept)
    solved = Solved(subject.run, solver, subject.quantizers)
    rescaling = _solution(solved, subject, fold)
    if rescaling.separate:
        weights = _packed_amax(rescaling, subject)
    else:
        weights = solved.weight_amax(subject.quantizers.weights)
    adapted = replace(rescaling.adapt(found), weights=found.weights | weights)
    return Applied(adapted, rescaling, solved, solved.kept_at_one)


def _solution(solved: Solved, subject: Subject, fold: Fold) -> Rescaling:
    """The scales of a solver's solutions, folded or separate."""
    quantizers = subject.quantizers
    folds = _folds(solved, subject)
    scales = solved.scales(folds.sites)
    norms = _norm_tensors(folds, scales, subject.source)
    if fold == "auto" or not scales:
        return folded(subject.dtype, folds, scales, norms)
    require_separable(solved.solver, quantizers)
    columns = {module: subject.matrix_shape(module)[1] for module in quantizers.weights}
    return kept_apart(subject.dtype, folds, scales, norms, columns, quantizers.fused_experts)


def require_separable(solver: Solver, quantizers: QuantizerPlan) -> None:
    """Raise InputError where the scales that a solver finds can't be kept apart (`--fold none`)."""
    if solver.method != "awq_lite":
        raise InputError(
            f"recipe {quantizers.recipe.name!r} can't be exported with --fold none: {solver.method} "
            "solved the weights as they are when folded; export with --fold auto"
        )
    if quantizers.together:
        raise InputError(
            f"--fold none stores a pre_quant_scale for each module, and {next(iter(quantizers.together))} is "
            "one of several in one tensor; export with --fold auto"
        )


def _folds(solved: Solved, subject: Subject) -> FoldMap:
    """Where scales may be folded: where the layers' proofs say so, and in layers that were solved without a
    proof where the table of families does.
    """
    proven = solved.proofs
    sites = {site.name: site for layer, proof in proven.items() for site in proof.sites_of(layer)}
    if unproven := set(solved.layers) - proven.keys():
        shapes = {name: entry.shape for name, entry in subject.source.tensors.items()}
        known = fold_map(shapes, subject.plan.text, subject.run.layout.relations)
        sites |= {name: site for name, site in known.sites.items() if split_name(name)[1] in unproven}
    return FoldMap(sites)


def _smoothquant(solver: Solver, subject: Subject, found: Observed) -> Rescaling:
    """SmoothQuant's scales, from each channel's amax and, for an alpha below 1, the weights.

    Linears that read one tensor share a scale. Fused experts keep 1, as do linears that nothing reached.
    """
    quantizers, modules = subject.quantizers, {}
    for module in quantizers.inputs:
        if module in quantizers.fused_experts or module in quantizers.constant_inputs:
            continue
        amax = found.inputs[input_quantizer(module)]
        if amax.dim() == 0:
            raise InputError(
                f"{input_quantizer(module)} holds one amax for all channels (the run was captured), but "
                "SmoothQuant needs every channel's; calibrate the model with `holdfast calibrate`"
            )
        if not bool(amax.isnan().all()):
            modules[module] = amax
    vectors: dict[str, Tensor] = {}
    for group in dict.fromkeys(connected(modules, subject.run.layout.groups("same_input")).values()):
        amax = merge([modules[module] for module in group])
        weights = _largest_columns(group, subject) if solver.alpha < 1 else torch.ones(1, len(amax))
        vectors |= dict.fromkeys(group, pre_quant_scale(amax, weights, solver.alpha))
    return smoothed(subject.dtype, vectors)


def _packed_amax(rescaling: Rescaling, subject: Subject) -> dict[str, Tensor]:
    """Largest |w| of every separately scaled weight whose format has a scale for the whole tensor: `[]`."""
    result = {}
    for module in rescaling.separate:
        if subject.quantizers.weights[module].tensor_leaf is not None:
            weight = rescaling.to_pack(module, subject.plan.matrices[module].read(subject.source))
            result[module] = largest_magnitude(weight.reshape(-1))
    return result


def _norm_tensors(folds: FoldMap, scales: Iterable[str], source: Source) -> dict[str, Tensor]:
    sites = [folds.sites[name] for name in scales if folds.sites[name].kind == "norm"]
    return {part.tensor: read_tensor(source, part.tensor) for site in sites for part in site.sources}


def _largest_columns(modules: Iterable[str], subject: Subject) -> Tensor:
    """Largest |w| of each input channel, one row per module: `[modules, columns]`."""
    weights = (subject.plan.matrices[module].read(subject.source) for module in modules)
    return torch.stack([weight.to(subject.dtype).abs().amax(0) for weight in weights])
