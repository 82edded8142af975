"""A solver's solutions, read from a run for export."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.commands import calibrate_command
from stages.fold.proof import LayerProof
from stages.recipe.chain import outdated, told
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import Solver, array_name
from stages.unify import PolicyUse
from state.errors import DamagedStore, InputError
from state.names import split_name
from state.objects import solutions
from state.reader import Calibration
from state.update import Solution


class Solved:
    """The solutions of one solver, layer by layer.

    Arrays are read when they are needed; those of one layer are kept, since the experts of a layer share
    them. Any thread may ask. Modules outside the decoder layers have no solution.

    Raises InputError naming the layers that have no solution, or one that holds no more, with the command
    that makes them; DamagedStore where they had one.
    """

    def __init__(self, run: Calibration, solver: Solver, quantizers: QuantizerPlan) -> None:
        self.run, self.solver = run, solver
        layers = {split_name(module)[1] for module in quantizers.weights} - {None}
        self.layers: list[int] = sorted(layer for layer in layers if layer is not None)
        _refuse_missing(run, solver, self.layers, quantizers.recipe.name)
        self._solutions: dict[int, Solution] = {
            layer: run.solution(solver.id, layer) for layer in self.layers
        }
        if broken := outdated({layer: found.attributes for layer, found in self._solutions.items()}):
            raise InputError(
                f"{run.path}: {told(broken)}; solve them again with: " + _command(run, quantizers.recipe.name)
            )
        self._layer: int | None = None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._one_reads = Lock()

    def get(self, name: str, field: str) -> Tensor | None:
        """A field of a module or fold site, the own part of an expert; None where the solver set none.

        float32, or the bytes that a checkpoint stores as int8.
        """
        layer = split_name(name)[1]
        array, expert = array_name(name, field)
        if layer not in self._solutions or array not in self._solutions[layer].arrays:
            return None
        with self._one_reads:
            if layer != self._layer:
                self._layer, self._arrays = layer, {}
            if array not in self._arrays:
                self._arrays[array] = self._solutions[layer].arrays[array]
            values = self._arrays[array]
        return torch.from_numpy(np.array(values if expert is None else values[expert]))

    def scales(self, sites: Collection[str]) -> dict[str, Tensor]:
        """The scale of every fold site that has one: float32 `[channels]`.

        Raises InputError for a scale at a place that is not among `sites`.
        """
        places = {array_name(site, "scale")[0] for site in sites}
        for solution in self._solutions.values():
            for name in solution.arrays:
                if name.endswith("@scale") and name not in places:
                    raise self._other_version(f"holds {name}, where nothing can be folded")
        found = {site: self.get(site, "scale") for site in sites}
        return {site: scale for site, scale in found.items() if scale is not None}

    def weight_amax(self, modules: Iterable[str]) -> dict[str, Tensor]:
        """What the tensor-wide weight scale comes from: float32 `[]`, of the modules in decoder layers.

        Raises InputError for one that the solution leaves out.
        """
        result = {}
        for module in modules:
            if split_name(module)[1] not in self._solutions:
                continue
            amax = self.get(module, "weight_amax")
            if amax is None:
                raise self._other_version(f"leaves out {module}")
            result[module] = amax.reshape(())
        return result

    def rounded(self, module: str, leaf: str) -> Tensor | None:
        """GPTQ's `weight` or `weight_scale` of a module, with the bytes a checkpoint holds; None where the
        weights are left to be rounded to nearest: by other methods, and outside the decoder layers.

        Raises InputError for a module in a layer that GPTQ left out.
        """
        if self.solver.method not in ("gptq", "tune") or split_name(module)[1] not in self._solutions:
            return None
        values = self.get(module, "values" if leaf == "weight" else "block_scale")
        if values is None:
            raise self._other_version(f"leaves out {module}")
        return values

    def block_amax(self, module: str) -> Tensor | None:
        """The amax each block is clipped at: float32 `[out, blocks]`; None where blocks keep their own."""
        amax = self.get(module, "amax")
        return amax if amax is not None and amax.dim() == 2 else None

    @property
    def proofs(self) -> dict[int, LayerProof]:
        """Layer → what was proven of it; layers that were solved by the table of families have none."""
        every = ((layer, solution.attributes) for layer, solution in self._solutions.items())
        return {layer: LayerProof.decode(found["proof"]) for layer, found in every if "proof" in found}

    @property
    def kept_at_one(self) -> dict[str, str]:
        """Fold site or module that keeps scale 1 → the reason."""
        return {name: why for found in self._attributes("kept_at_one") for name, why in found.items()}

    @property
    def policies(self) -> tuple[PolicyUse, ...]:
        """Every policy that acted while solving."""
        touched: dict[str, list[str]] = defaultdict(list)
        for found in self._attributes("policies"):
            for use in found:
                touched[use["policy"]] += use["modules"]
        return tuple(
            PolicyUse(policy, tuple(modules), f"acted while solving ({self.solver.method})")
            for policy, modules in touched.items()
        )

    def _other_version(self, what: str) -> InputError:
        return InputError(
            f"the solution {self.solver.id} in {self.run.path} {what}; it was made by another version: "
            "calibrate with this one into a new run"
        )

    def _attributes(self, name: str) -> Iterable[Any]:
        return (solution.attributes[name] for solution in self._solutions.values())


def _refuse_missing(run: Calibration, solver: Solver, layers: Iterable[int], recipe: str) -> None:
    solved = solutions(run.head.objects).get(solver.id, set())
    missing = [layer for layer in layers if layer not in solved]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
        lost = run.lost.get(solver.id, set()) & set(missing)
        error = DamagedStore if lost else InputError
        raise error(
            f"recipe {recipe!r} needs solutions of {solver.method} ({solver.id}); {run.path} holds none for "
            f"{len(missing)} layers ({shown}){', where they are damaged' if lost else ''}; "
            f"make them with: {_command(run, recipe)}"
        )


def _command(run: Calibration, recipe: str) -> str:
    """As the run was made, but for the recipe."""
    return calibrate_command({**run.record.settings, "run": str(run.path), "recipe": recipe})
