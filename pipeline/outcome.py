"""Every way a command can end, as a line and an exit code. No tracebacks for what a person can put right."""

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError

from pipeline.versions import report
from stages.calibrate.signals import Interrupted
from state.errors import HoldfastError, InputError, Stopped
from state.reasons import printable, reason

UNEXPECTED = 1


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turns whatever is raised inside into a message on standard error and `typer.Exit` with its code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        if debug:
            traceback.print_exc()
        message, code = describe(error)
        if code == UNEXPECTED:
            message += f"\nThis is not expected. What was committed is safe. {report()}"
            if not debug:
                message += "\nWith --debug, the same command shows where it happened."
        typer.echo(f"holdfast: {printable(message)}", err=True)
        raise typer.Exit(code) from None


def describe(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an error."""
    if isinstance(error, HoldfastError):
        return str(error) or type(error).__name__, error.exit_code
    if isinstance(error, KeyboardInterrupt | Interrupted):
        by = f" by {error}" if isinstance(error, Interrupted) else ""
        return (
            f"stopped{by}. What was committed is safe; the same command goes on from there.",
            Stopped.exit_code,
        )
    if isinstance(error, ValidationError):
        return "; ".join(_invalid_settings(error)), InputError.exit_code
    if isinstance(error, OSError):
        return _system_error(error), InputError.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's is no other
        return f"out of memory: {reason(error)} A smaller --batch needs less.", InputError.exit_code
    return f"{type(error).__name__}: {reason(error)}", UNEXPECTED


def _invalid_settings(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        option = "-".join(str(part).replace("_", "-") for part in problem["loc"])
        yield f"{option} = {problem['input']!r}: {problem['msg'].lower()}"


def _system_error(error: OSError) -> str:
    """The file and the reason. An error that names no file says at least what it is and when it came."""
    said = error.strerror or reason(error)
    if error.filename:
        return f"{_shown(error.filename)}: {said}"
    kind = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return " ".join([said, *([f"({kind})"] if kind not in said else []), *getattr(error, "__notes__", ())])


def _shown(filename: str | bytes | int) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes) else f"file descriptor {filename}"
