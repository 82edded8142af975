"""Brings a solver and a layer together: what it needs to know of the layer's weights, statistics and places
to fold.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.host import to_host
from stages.calibrate.observe.second_moments import Moments
from stages.calibrate.schedule.layer_matrices import LayerMatrices
from stages.calibrate.schedule.proving import Prover
from stages.calibrate.schedule.quantized_stream import QuantizedStream
from stages.calibrate.schedule.tuning import NotTuned, tune
from stages.calibrate.signals import StopRequest
from stages.fold.folds import FoldMap, FoldSite
from stages.formats import WeightFormat
from stages.model.skeleton import Skeleton
from stages.recipe.chain import links, outdated
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import Solver, stacked_name
from stages.solve.layer import Group, LayerSolution, Place, solve_layer
from stages.solve.moments import SiteStatistics
from state.errors import InputError
from state.layout import SiteArray
from state.names import Site, split_name
from state.update import Solution


class SolverPass:
    """Solves layer after layer, for `LayerByLayer`.

    Args:
        prover: finds where scales may be folded, for solvers that search any.
        solved: layers whose solutions the run holds already.
        attributes: kept with every solution, such as the environment it was found in.
        stop: raised as Interrupted while a layer is solved, which may take minutes: without its end the layer
        has to be solved again anyway.
        require_finite: called with a layer before it is solved; raises where it saw inf or NaN.
        read: a hub tensor as the source has it. Export folds scales into that; in memory a norm may be wider.
        stream: the second stream, for solvers that see inputs as engines do; None for others.
        stored: the solution of a layer that is solved already.
        warn: told of layers that are solved otherwise than asked.
    """

    def __init__(
        self,
        solver: Solver,
        quantizers: QuantizerPlan,
        skeleton: Skeleton,
        statistics: Accumulators,
        prover: Prover,
        solved: set[int],
        attributes: dict[str, Any],
        stop: StopRequest,
        require_finite: Callable[[int], None],
        read: Callable[[str], Tensor],
        stream: QuantizedStream | None,
        stored: Callable[[int], Solution],
        warn: Callable[[str], None],
    ) -> None:
        self.solver, self.quantizers, self.skeleton = solver, quantizers, skeleton
        self.statistics, self.prover = statistics, prover
        self.solved, self.attributes, self.stop = set(solved), attributes, stop
        self.require_finite, self.read = require_finite, read
        self.stream, self.stored, self.warn = stream, stored, warn
        self.modules = _modules_by_layer(quantizers)
        # What is kept with the solutions that later ones are made behind.
        self._chain = {layer: stored(layer).attributes for layer in solved} if stream is not None else {}
        self._outdated: dict[int, int] = {}

    @property
    def two_streams(self) -> bool:
        return self.stream is not None

    def missing(self, layer: int) -> bool:
        return layer in self.modules and layer not in self.solved

    def moments(self, layer: int) -> Moments:
        layout = self.statistics.layout
        # All experts of a layer share an array.
        modules = (module for module in self.modules[layer] if split_name(module)[2] in (None, 0))
        keys = {layout.locate(Site(module, "input"))[0].key for module in modules}
        return Moments(keys, self._device())

    @torch.inference_mode()
    def solve(self, step: LayerStep, moments: Moments) -> Solution:
        """The layer's solution; its weights are loaded.

        Raises InputError where it saw inf or NaN, or inputs whose squares leave float32.
        """
        method, layer = self.solver.method, step.layer
        self.require_finite(layer)
        attributes, folds = dict(self.attributes), FoldMap()
        with self.stop.at_once():
            if self.stream is not None:
                self.stream.collect(step, moments)
            if not moments.is_finite():
                raise InputError(
                    f"inputs of layer {layer} are so large that their squares leave float32, and solvers "
                    "need those; choose a recipe without a solver, such as nvfp4"
                )
            if self.solver.searches_scales:
                proof = self.prover.prove(step)
                attributes["proof"] = proof.encode()
                folds = proof.folds(layer, self.modules[layer])
            found = solve_layer(
                self._groups(layer, moments),
                self._places(folds),
                scales_by_awq=self.solver.searches_scales,
                clip=method in ("awq_clip", "awq_full"),
                sweep=method == "local_hessian",
                damping=self.solver.damping if method in ("gptq", "tune") else None,
                latents=method == "tune",
            )
            if method == "tune":
                self._tune(step, found)
            if self.stream is not None:
                self.stream.advance(step, found.arrays)
        attributes |= {"method": method, "policies": found.policies, "kept_at_one": folds.impossible}
        arrays = to_host(found.arrays)
        self.solved.add(layer)
        if self.stream is not None:
            before = {earlier: kept for earlier, kept in self._chain.items() if earlier < layer}
            attributes |= links(arrays, before)
            self._chain[layer] = attributes
            self._drop_outdated()
        return Solution(self.solver.id, layer, arrays, attributes)

    def take_outdated(self) -> dict[int, int]:
        """Layers whose solutions hold no more since this was last asked → the layer that has another one than
        they were made behind. They count as missing.
        """
        found, self._outdated = self._outdated, {}
        return found

    def _drop_outdated(self) -> None:
        found = outdated(self._chain)
        for layer in found:
            del self._chain[layer]
        self.solved -= found.keys()
        self._outdated |= found

    def _tune(self, step: LayerStep, found: LayerSolution) -> None:
        """Go on from GPTQ's solution by gradient steps; where that can't be or does not help, it stays."""
        assert self.stream is not None
        latents, found.latents = found.latents, {}
        stacked = list(latents)
        try:
            tuned = tune(step, self.stream, latents)
        except NotTuned as error:
            self._name_not_tuned(step.layer, stacked, found)
            self.warn(f"layer {step.layer} is not tuned and keeps GPTQ's weights: {error}")
            return
        for name, quantized in tuned.found.items():
            found.keep(name, quantized)
        if tuned.without:
            self._name_not_tuned(step.layer, tuned.without, found)
            self.warn(
                f"of layer {step.layer}, {', '.join(sorted(tuned.without))} keep GPTQ's weights: autograd "
                "finds nothing of the layer's output that depends on them"
            )

    def _name_not_tuned(self, layer: int, stacked: Collection[str], found: LayerSolution) -> None:
        modules = [module for module in self.modules[layer] if stacked_name(module) in stacked]
        found.policies.append({"policy": "not-tuned", "modules": modules})

    def pass_by(self, step: LayerStep) -> None:
        """Go on behind a layer that is not solved now: its solution is stored, or nothing in it is
        quantized.
        """
        if self.stream is None:
            return
        arrays: dict[str, Tensor] = {}
        if step.layer in self.modules:
            stored = self.stored(step.layer).arrays
            arrays = {name: torch.from_numpy(np.array(stored[name])).to(self._device()) for name in stored}
        self.stream.advance(step, arrays)

    def _groups(self, layer: int, moments: Moments) -> dict[str, Group]:
        """Quantized weights by the site they read, and format: [experts or 1, out, in]."""
        members: dict[tuple[str, WeightFormat], dict[str, Tensor]] = {}
        sites: dict[tuple[str, WeightFormat], SiteArray] = {}
        down: set[tuple[str, WeightFormat]] = set()
        together: set[tuple[str, WeightFormat]] = set()
        matrices = LayerMatrices(self.skeleton, self.quantizers.weights, layer)
        for name, (module, weights) in matrices.read().items():
            array, _ = self.statistics.layout.locate(Site(module, "input"))
            key = array.key, self.quantizers.weights[module]
            members.setdefault(key, {})[name] = weights
            sites[key] = array
            if any(module == f"{experts.hub}.0.{experts.down}" for experts in self.skeleton.experts):
                down.add(key)
            if module in self.quantizers.together:
                together.add(key)
        return {
            f"{key[0]}.{key[1].name}": Group(
                stacked, self._site(sites[key], layer, moments), key[1], key not in down, key in together
            )
            for key, stacked in members.items()
        }

    def _site(self, array: SiteArray, layer: int, moments: Moments) -> SiteStatistics:
        row = (array.layers.index(layer),) if array.layers else ()
        total = self.statistics.total[array.key][row]
        total = total if array.experts is not None else total[None]
        return SiteStatistics(moments.of(array), total.float(), moments.tokens_of(array))

    def _places(self, folds: FoldMap) -> list[Place]:
        """Where a layer's scales can go, experts taken together."""
        return [
            Place(
                site,
                name,
                {stacked_name(part.module): part for part in site.divided if len(part.shape) > 1},
                tuple(dict.fromkeys(stacked_name(part.module) for part in site.consumers)),
                self.read(site.sources[0].tensor).to(self._device()) if site.kind == "norm" else None,
            )
            for name, site in _stacked_sites(folds).items()
        ]

    def _device(self) -> torch.device:
        return next(iter(self.statistics.tokens.values())).device


def _modules_by_layer(quantizers: QuantizerPlan) -> dict[int, dict[str, None]]:
    """Quantized modules of each decoder layer, in order."""
    modules: dict[int, dict[str, None]] = {}
    for module in quantizers.weights:
        layer = split_name(module)[1]
        if layer is not None:
            modules.setdefault(layer, {})[module] = None
    return modules


def _stacked_sites(folds: FoldMap) -> dict[str, FoldSite]:
    """The places to fold by stacked name, the first expert's standing for all."""
    sites: dict[str, FoldSite] = {}
    for site in folds.sites.values():
        sites.setdefault(stacked_name(site.name), site)
    return sites
