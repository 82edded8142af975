"""Commands to type next, written the way the person is working: through make, or with `holdfast` itself.

The messages of every stage end with one, so this stands below the command line. No torch.
"""

import os
import shlex
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stages.settings import CalibrateSettings, QuantizeSettings

MAKE_VARIABLES = ("model", "data", "run", "out", "recipe", "samples", "seq", "batch", "device")
"""The settings that the Makefile has a variable for."""


def flag(name: str) -> str:
    """The option of a setting: `commit_every` → `--commit-every`."""
    return f"--{name.replace('_', '-')}"


def off_flag(name: str) -> str:
    """The option that turns a setting off which is on by default."""
    return f"--no-{name.replace('_', '-')}"


def positional(settings: type[BaseModel]) -> tuple[str, ...]:
    """The settings that a command takes without naming them: those that have no default."""
    return tuple(name for name, field in settings.model_fields.items() if field.is_required())


def as_options(
    settings: type[BaseModel], values: Mapping[str, Any], leave_out: Container[str] = ()
) -> list[str]:
    """Values of settings as options of the command line, but for defaults and what is left out."""
    options = []
    for name, field in settings.model_fields.items():
        value = values.get(name, field.default)
        if field.is_required() or name in leave_out or value == field.default:
            continue
        if isinstance(value, bool):
            options.append(flag(name) if value else off_flag(name))
        else:
            options += [flag(name), str(value)]
    return options


def calibrate_command(settings: Mapping[str, Any]) -> str:
    """The command that goes on with a run, from its record; whatever has its default value is left out, and
    so is `resume`, which is about the process that began it.

    What has no default and is not in the record, as in that of a captured run, is there as a word to replace.
    """
    return _going_on("calibrate", CalibrateSettings, settings)


def quantize_command(settings: QuantizeSettings) -> str:
    """The command that goes on with this one, as `calibrate_command` writes it."""
    return _going_on("quantize", QuantizeSettings, settings.model_dump(mode="json"))


def _going_on(command: str, kind: type[BaseModel], settings: Mapping[str, Any]) -> str:
    given = {name: str(settings.get(name, name.upper())) for name in positional(kind)}
    if not _through_make():
        options = as_options(kind, settings, leave_out=("resume",))
        return shlex.join(["holdfast", command, *given.values(), *options])
    given |= {
        name: str(settings[name])
        for name in MAKE_VARIABLES
        if name in kind.model_fields
        and name in settings
        and settings[name] != kind.model_fields[name].default
    }
    variables = [f"{name.upper()}={value}" for name, value in given.items()]
    if options := as_options(kind, settings, leave_out=(*MAKE_VARIABLES, "resume")):
        variables.append(f"ARGS={shlex.join(options)}")
    return shlex.join(["make", command, *variables])


def export_command(run: str, recipe: str, remembered: str) -> str:
    """The command that exports a run, into a folder named after run and recipe.

    remembered: the recipe that export takes from the run; any other is named.
    """
    out = f"exports/{Path(run).name}-{Path(recipe).name}"
    named = recipe != remembered
    if _through_make():
        return shlex.join(["make", "export", f"RUN={run}", f"OUT={out}", *([f"RECIPE={recipe}"] * named)])
    return shlex.join(["holdfast", "export", run, out, *([flag("recipe"), recipe] * named)])


def check_command(run: str) -> str:
    """The command that verifies a run."""
    return _of_run("check", run)


def repair_command(run: str) -> str:
    """The command that repairs a run."""
    return _of_run("repair", run)


def _of_run(command: str, run: str) -> str:
    words = ["make", command, f"RUN={run}"] if _through_make() else ["holdfast", command, run]
    return shlex.join(words)


def _through_make() -> bool:
    return "MAKELEVEL" in os.environ
