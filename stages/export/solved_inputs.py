"""What a solver took the inputs for, against what an export writes of them."""

from collections.abc import Sequence
from dataclasses import asdict

from stages.export.observed import Observed
from stages.recipe.quantizer_plan import QuantizerPlan
from stages.recipe.solvers import INPUT_POLICIES, Solver
from stages.recipe.unified_inputs import Groups, input_quantizer, solver_inputs, unified_inputs
from stages.unify import Policies, PolicyUse
from state.names import split_name

NOT_AS_SOLVED = "inputs=not as solved"
"""Name of the use, in the report, of other policies than the solver's."""


def not_as_solved(
    solver: Solver | None,
    found: Observed,
    quantizers: QuantizerPlan,
    same_input: Groups,
    engine_fused: Groups,
    policies: Policies,
) -> Sequence[PolicyUse]:
    """Under other policies than those that inputs were unified under before a solver saw them: a use that
    names both, and the inputs of decoder layers that now have another scale than it saw, if there are any.
    """
    if solver is None or not solver.two_streams or not quantizers.inputs or policies == INPUT_POLICIES:
        return ()
    every = solver_inputs(found.inputs, quantizers, same_input, engine_fused)
    seen = {module: amax for module, amax in every.items() if split_name(module)[1] is not None}
    written, _ = unified_inputs(found.inputs, quantizers, same_input, engine_fused, policies)
    others = []
    for module, solved in seen.items():
        now = written.get(module)
        if solved is None or now is None or not now.equal(solved):
            others.append(input_quantizer(module))
    theirs, ours = asdict(INPUT_POLICIES), asdict(policies)
    changed = [name for name in ours if ours[name] != theirs[name]]
    detail = (
        f"{solver.method} saw inputs under {_named(theirs, changed)}, and this export is under "
        f"{_named(ours, changed)}: {len(others)} of {len(seen)} inputs have another scale than it saw"
    )
    return (PolicyUse(NOT_AS_SOLVED, tuple(others), detail),)


def _named(policies: dict[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={policies[name]}" for name in names)
