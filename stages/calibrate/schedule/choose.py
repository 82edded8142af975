"""Which schedule comes next for a run, and what a solver still owes it."""

import os
from pathlib import Path
from typing import Literal, cast

import torch

from stages.calibrate.prepare import Prepared
from stages.recipe.chain import outdated
from stages.recipe.solvers import Solver
from stages.settings import CalibrateSettings
from state.errors import InputError
from state.head import Head
from state.names import split_name
from state.objects import solutions
from state.reader import open_run

Name = Literal["whole", "layerwise"]

USABLE = 0.8  # of the memory that is free: the forward needs some too


def next_schedule(settings: CalibrateSettings, work: Prepared, head: Head) -> Name | None:
    """The schedule of the pass that the run needs next, or None where it has all that was asked for.

    Statistics under way go on as they were begun. A solver's pass is always layerwise, and where a run begins
    with a solver the statistics come from the same pass.
    Raises InputError where --schedule contradicts what the run needs.
    """
    unsolved = work.solver is not None and unsolved_layers(work, work.solver, head, settings.run)
    if head.finished and not unsolved:
        return None
    if head.finished:
        return "layerwise"
    begun = _begun(head)
    if begun is not None and settings.schedule not in ("auto", begun):
        raise InputError(
            f"{settings.run} was begun with the {begun} schedule; leave --schedule {settings.schedule} out"
        )
    if begun is not None or settings.schedule != "auto":
        return begun or cast(Name, settings.schedule)
    return "layerwise" if unsolved or (work.probe is not None and not fits(work)) else "whole"


def _begun(head: Head) -> Name | None:
    """The schedule under which unfinished statistics were begun."""
    if head.finished or (head.cursor.batch, head.cursor.layer) == (0, 0):
        return None
    return "whole" if head.cursor.batch else "layerwise"


def unsolved_layers(work: Prepared, solver: Solver, head: Head, run: Path) -> set[int]:
    """Decoder layers with quantized modules and no solution of this solver, or one that holds no more."""
    layers = {split_name(module)[1] for module in work.quantizers.weights}
    solved = solved_layers(solver.id, head) - outdated_layers(solver, head, run).keys()
    return {layer for layer in layers if layer is not None} - solved


def outdated_layers(solver: Solver, head: Head, run: Path) -> dict[int, int]:
    """Layers whose solutions hold no more → the layer that has another one than they were made behind."""
    solved = solved_layers(solver.id, head)
    if not solver.two_streams or not solved:
        return {}
    stored = open_run(run)
    return outdated({layer: stored.solution(solver.id, layer).attributes for layer in solved})


def solved_layers(solver_id: str, head: Head) -> set[int]:
    """Layers whose solutions a commit holds."""
    return solutions(head.objects).get(solver_id, set())


def fits(work: Prepared) -> bool:
    """Whether the model's weights fit the memory that is free on its device."""
    needed = sum(entry.nbytes for entry in work.source.tensors.values())
    if work.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(work.device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return needed <= USABLE * free
