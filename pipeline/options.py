"""Command lines made from settings: every field is an argument or an option, its description the help."""

import functools
import os
import warnings
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.outcome import exit_codes
from stages.commands import flag, off_flag

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own warnings.")]

Asked = TypeVar("Asked", bound=BaseModel)


def takes(settings: type[Asked]) -> Callable[[Callable[[Asked], None]], Callable[..., None]]:
    """Makes a function of settings a command of typer: its options are the fields, and `--debug`.

    Whatever it raises, also for values that the settings refuse, ends as a message and an exit code.
    """

    def decorate(command: Callable[[Asked], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def typed(debug: bool, **given: Any) -> None:
            with exit_codes(debug):
                quiet(debug)
                command(settings(**given))

        typed.__signature__ = signature(settings)  # type: ignore[attr-defined]
        return typed

    return decorate


def signature(settings: type[BaseModel]) -> Signature:
    """What typer reads: one parameter for each field, and `debug`."""
    parameters = [_parameter(name, field) for name, field in settings.model_fields.items()]
    debug = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    return Signature([*parameters, debug])


def quiet(debug: bool) -> None:
    """The libraries' warnings are about their own interfaces; none is for the person at this command line."""
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _parameter(name: str, field: FieldInfo) -> Parameter:
    declared: Any
    if field.is_required():
        declared, default = typer.Argument(help=field.description, show_default=False), Parameter.empty
    else:
        declared, default = typer.Option(_spelled(name, field), help=field.description), field.default
    annotation = Annotated[field.annotation, declared]  # type: ignore[name-defined]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _spelled(name: str, field: FieldInfo) -> str:
    """A switch that is off is turned on by its name; one that is on can be turned off as well."""
    return f"{flag(name)}/{off_flag(name)}" if field.default is True else flag(name)
