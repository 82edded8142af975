"""The rules between rooms, tried on toy sources: each must fail where it should."""

import pytest

from tests.imports import find_circle, import_graph, imported
from tests.rooms import FLOORS, forbidden, room_graph, room_of

TOY = {
    "holdfast": "def calibrate():\n    from stages.calibrate.run import calibrate\n",
    "pipeline": "",
    "pipeline.cli": "import stages.settings\nfrom stages.export.run import export",
    "stages": "",
    "stages.settings": "",
    "stages.capture": "from stages.calibrate.run import calibrate",
    "stages.calibrate": "",
    "stages.calibrate.run": "from stages.solve import awq\nfrom stages.settings import CalibrateSettings",
    "stages.export": "",
    "stages.export.run": "from stages.formats.pack import pack",
    "stages.verify": "",
    "stages.engines": "",
    "stages.recipe": "",
    "stages.solve": "",
    "stages.solve.awq": "from stages.fold.sites import fold_map",
    "stages.formats": "",
    "stages.formats.pack": "import numpy",
    "stages.kernels": "",
    "stages.fold": "",
    "stages.fold.sites": "from state.errors import InputError",
    "stages.model": "from state import errors",
    "state": "",
    "state.errors": "from typing import TYPE_CHECKING",
    "state.head": "from state.errors import InputError",
}


def test_the_toy_keeps_the_rules() -> None:
    assert forbidden(TOY) == []
    assert find_circle(import_graph(TOY)) == []
    assert find_circle(room_graph(TOY)) == []


@pytest.mark.parametrize(
    ("importer", "source", "arrow"),
    [
        ("state.errors", "import stages.settings", "state.errors -> stages.settings"),
        ("state.errors", "from stages import settings", "state.errors -> stages.settings"),
        ("state.errors", "import pipeline", "state.errors -> pipeline"),
        ("stages.settings", "from stages.fold.sites import x", "stages.settings -> stages.fold.sites"),
        ("stages.fold.sites", "from stages.solve.awq import x", "stages.fold.sites -> stages.solve.awq"),
        ("stages.formats.pack", "import stages.engines", "stages.formats.pack -> stages.engines"),
        ("stages.solve.awq", "import stages.calibrate.run", "stages.solve.awq -> stages.calibrate.run"),
        ("stages.recipe", "import stages.export", "stages.recipe -> stages.export"),
        ("stages.export.run", "import stages.calibrate", "stages.export.run -> stages.calibrate"),
        ("stages.verify", "from stages.export.run import x", "stages.verify -> stages.export.run"),
        ("stages.calibrate.run", "import stages.verify", "stages.calibrate.run -> stages.verify"),
        ("stages.calibrate.run", "import stages.capture", "stages.calibrate.run -> stages.capture"),
        ("stages.capture", "import stages.export", "stages.capture -> stages.export"),
        ("stages.export.run", "from pipeline.cli import app", "stages.export.run -> pipeline.cli"),
        ("pipeline.cli", "import holdfast", "pipeline.cli -> holdfast"),
    ],
)
@pytest.mark.parametrize("place", ["{}", "def late():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_an_arrow_that_goes_back_is_found(importer: str, source: str, arrow: str, place: str) -> None:
    assert forbidden(TOY | {importer: place.format(source)}) == [arrow]


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_every_room_may_import_state_but_state_none(room: str) -> None:
    assert forbidden({room: "import state", "state": ""}) == []
    if room != "state":
        assert forbidden({room: "", "state": f"import {room}"}) == [f"state -> {room}"]


@pytest.mark.parametrize("place", ["{}", "def late():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_circle_of_files_is_found(place: str) -> None:
    circular = TOY | {"state.errors": place.format("from state.head import Head")}
    assert forbidden(circular) == []
    assert find_circle(import_graph(circular)) == ["state.errors", "state.head", "state.errors"]


def test_a_circle_of_rooms_on_one_floor_is_found() -> None:
    one_way = TOY | {"stages.fold": "import stages.formats"}
    assert (forbidden(one_way), find_circle(room_graph(one_way))) == ([], [])
    both = one_way | {"stages.formats.pack": "import stages.fold.sites"}
    assert find_circle(import_graph(both)) == []
    assert find_circle(room_graph(both)) == ["stages.fold", "stages.formats", "stages.fold"]


def test_names_are_traced_to_their_modules() -> None:
    assert set(imported("import a.b as c\nfrom d.e import f, g")) == {"a.b", "d.e.f", "d.e.g"}
    sources = {"a": "", "a.b": "", "c": "from a.b import f\nfrom a import b\nimport numpy.linalg"}
    assert import_graph(sources)["c"] == {"a.b"}
    with pytest.raises(ValueError, match="line 2: relative"):
        list(imported("import os\nfrom .a import b"))


def test_a_room_outside_the_table_is_refused() -> None:
    assert room_of("stages.calibrate.text.tokens") == "stages.calibrate"
    for unknown in ("stages.attic", "benchmarks.bench"):
        with pytest.raises(ValueError, match=f"{unknown} is not in any room"):
            room_of(unknown)
