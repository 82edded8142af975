"""`holdfast recipes`: every recipe that modelopt ships, served or why not, as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.tables import print_table
from stages.model.folder import locate
from stages.progress import Progress
from stages.recipe.quantizer_plan import told_left_out
from stages.recipe.survey import Surveyed

STOOD_IN = "* names modules that this model does not have; to judge on yours: holdfast recipes --model MODEL"


def look_through(model: str | None, progress: Progress) -> list[Surveyed]:
    """Judge every recipe, on the model if one is given.

    Raises InputError for a model that can't be served at all.
    """
    from stages.recipe.recipes import shipped
    from stages.recipe.survey import survey

    if model is None:
        from stages.recipe.reference import reference_model

        skeleton = reference_model()
    else:
        from stages.model.dequantize.source import open_source
        from stages.model.skeleton import Skeleton, load_config

        folder = locate(model, None, progress)
        skeleton = Skeleton(load_config(folder), open_source(Path(folder)).tensors)
    names = shipped()
    progress.start("judging recipes", total=len(names), unit="recipes")
    found = []
    for name in names:
        found.append(survey(name, skeleton, stand_in=model is None))
        progress.advance(1)
    progress.finish()
    return found


def print_recipes(found: Sequence[Surveyed], as_json: bool) -> None:
    """The recipes on standard output: those that are served first, then the others with the reason."""
    if as_json:
        print(json.dumps([{"served": one.served, **asdict(one)} for one in found], indent=2))
        return
    served = [one for one in found if one.reason is None]
    heads = ("recipe", "bits per weight", "KV cache", "scales or solver", "needs of a run")
    print_table([heads, *(_row(one) for one in served)])
    if any(one.stood_in for one in served):
        print(STOOD_IN)
    for one in served:
        for line in told_left_out(one.left_out):
            print(f"{one.name}: {line}")
    print(f"\nnot served, {len(found) - len(served)} of {len(found)}:")
    for one in found:
        if one.reason is not None:
            # The rest says what else there is, the same for all.
            reason = one.reason.removeprefix(f"recipe {one.name!r} ").partition("; ")[0]
            print(f"  {one.name}: {reason}")


def _row(one: Surveyed) -> tuple[str, ...]:
    bits = ", ".join(f"{name} {value:g}" for name, value in one.bits.items())
    name = f"{one.name} *" if one.stood_in else one.name
    return name, bits, one.cache or "-", one.solver or one.scales, one.needs
