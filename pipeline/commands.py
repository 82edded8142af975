"""Commands to type next, written the way the person is working: through make, or with `holdfast` itself."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.settings import POSITIONAL, CalibrateSettings, as_options

MAKE_VARIABLES = ("model", "data", "run", "recipe", "samples", "seq", "batch", "device")


def calibrate_command(settings: Mapping[str, Any]) -> str:
    """The command that made a run, from its record; whatever has its default value is left out."""
    given = {
        name: settings[name]
        for name, field in CalibrateSettings.model_fields.items()
        if name in settings and settings[name] != field.default
    }
    if not _through_make():
        positions = [str(given[name]) for name in POSITIONAL if name in given]
        return shlex.join(["holdfast", "calibrate", *positions, *as_options(settings, POSITIONAL)])
    variables = [f"{name.upper()}={given[name]}" for name in MAKE_VARIABLES if name in given]
    if options := as_options(settings, MAKE_VARIABLES):
        variables.append(f"ARGS={shlex.join(options)}")
    return shlex.join(["make", "calibrate", *variables])


def export_command(run: str, recipe: str, remembered: str) -> str:
    """The command that exports a run, into a folder named after run and recipe.

    remembered: the recipe that export takes from the run; any other is named.
    """
    out = f"exports/{Path(run).name}-{Path(recipe).name}"
    named = recipe != remembered
    if _through_make():
        return shlex.join(["make", "export", f"RUN={run}", f"OUT={out}", *([f"RECIPE={recipe}"] * named)])
    return shlex.join(["holdfast", "export", run, out, *(["--recipe", recipe] * named)])


def _through_make() -> bool:
    return "MAKELEVEL" in os.environ
