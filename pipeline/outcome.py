"""Every way a command can end, as a line and an exit code. No tracebacks for what a person can put right."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError

from pipeline.versions import report
from state.errors import HoldfastError, InputError, Stopped

UNEXPECTED = 1


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turns whatever is raised inside into a message on standard error and `typer.Exit` with its code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = describe(error)
        if code == UNEXPECTED:
            message += f"\nThis is not expected. What was committed is safe. {report()}"
            if not debug:
                message += "\nWith --debug, the same command shows where it happened."
        typer.echo(f"holdfast: {message}", err=True)
        raise typer.Exit(code) from None


def describe(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an error."""
    if isinstance(error, HoldfastError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped. What was committed is safe; the same command goes on from there.", Stopped.exit_code
    if isinstance(error, ValidationError):
        return "; ".join(_invalid_settings(error)), InputError.exit_code
    if isinstance(error, OSError):
        return _system_error(error), InputError.exit_code
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return f"out of memory: {_first_line(error)} A smaller --batch needs less.", InputError.exit_code
    return f"{type(error).__name__}: {_first_line(error)}", UNEXPECTED


def _invalid_settings(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        option = "-".join(str(part).replace("_", "-") for part in problem["loc"])
        yield f"{option} = {problem['input']!r}: {problem['msg'].lower()}"


def _system_error(error: OSError) -> str:
    reason = error.strerror or _first_line(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
