"""A field of a settings class is all that an option takes, in help, on the command line and in commands."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from pipeline.options import takes
from stages.commands import as_options, positional
from stages.settings import CalibrateSettings, ExportSettings, QuantizeSettings

runner = CliRunner(env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"})


class Toy(BaseModel):
    """One of every kind of field."""

    place: Path = Field(description="Where it is.")
    speed_limit: float = Field(default=1.5, gt=0, description="How fast.")
    rounds: int = Field(default=3, description="How often.")
    mood: Literal["calm", "wild"] = Field(default="calm", description="How it feels.")
    note: str | None = Field(default=None, description="What to remember.")
    loud: bool = Field(default=False, description="Whether it is heard.")
    safe: bool = Field(default=True, description="Whether it is watched.")


def run(*words: str) -> tuple[Any, list[Toy]]:
    """What a command of Toy ends with, and what it was given."""
    app, given = typer.Typer(rich_markup_mode="markdown"), []

    @app.command()
    @takes(Toy)
    def play(settings: Toy) -> None:
        """Plays."""
        given.append(settings)
        if settings.rounds == 0:
            raise ZeroDivisionError("no rounds")

    return runner.invoke(app, list(words)), given


def test_help_is_the_fields_descriptions() -> None:
    shown = re.sub(r"[\s│]+", " ", run("--help")[0].output)
    for text in (
        "[OPTIONS] {place} Plays.",
        "* place <path> Where it is. [required]",
        "--speed-limit <float> How fast. [default: 1.5]",
        "--rounds <int> How often. [default: 3]",
        "--mood <calm|wild> How it feels. [default: calm]",
        "--note <str> What to remember. --loud",
        "--loud <bool> Whether it is heard. --safe",
        "--safe --no-safe",
        "--debug",
    ):
        assert text in shown


@pytest.mark.parametrize(
    "toy",
    [
        Toy(place="a"),
        Toy(place="a b", speed_limit=0.25, rounds=-1, mood="wild", note="it's $HOME", loud=True, safe=False),
    ],
    ids=["defaults", "everything"],
)
def test_settings_written_as_a_command_are_read_again(toy: Toy) -> None:
    values = toy.model_dump(mode="json")
    words = [*(str(values[name]) for name in positional(Toy)), *as_options(Toy, values)]
    ended, given = run(*words)
    assert (ended.exit_code, given) == (0, [toy])


def test_what_a_field_refuses_ends_as_a_message() -> None:
    ended, given = run("a", "--speed-limit", "0")
    assert (ended.exit_code, given) == (2, [])
    assert ended.stderr == "holdfast: speed-limit = 0.0: input should be greater than 0\n"
    assert "Traceback" not in run("a", "--rounds", "0")[0].stderr
    assert "Traceback" in run("a", "--rounds", "0", "--debug")[0].stderr


@pytest.mark.parametrize("settings", [CalibrateSettings, ExportSettings, QuantizeSettings])
def test_every_setting_says_what_it_is(settings: type[BaseModel]) -> None:
    assert [name for name, field in settings.model_fields.items() if not field.description] == []
