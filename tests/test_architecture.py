"""Rules that keep the rooms apart: imports go down the floors of tests/rooms.py, and state needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from stages.formats import TABLE
from tests.imports import find_circle, import_graph, imported, read_sources
from tests.rooms import forbidden, room_graph

ROOT = Path(__file__).parent.parent
PACKAGES = ("holdfast", "pipeline", "stages", "state")
STATE_LIBRARIES = {"numpy", "zarr", "pydantic", "xxhash", "filelock"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LONGEST = 300

FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
FOLDERS = sorted({path.parent for path in FILES})
SOURCES = read_sources(ROOT, PACKAGES)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def libraries(path: Path) -> set[str]:
    """Top-level names of the packages a file imports, wherever in it."""
    return {name.partition(".")[0] for name in imported(path.read_text(encoding="utf-8"))}


def test_imports_go_one_way() -> None:
    assert forbidden(SOURCES) == []


def test_no_circle_of_imports() -> None:
    assert find_circle(room_graph(SOURCES)) == []
    assert find_circle(import_graph(SOURCES)) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_product_needs_no_tests(path: Path) -> None:
    assert not libraries(path) & {"tests", "benchmarks"}


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "state")], ids=name_of)
def test_state_needs_few_libraries(path: Path) -> None:
    assert libraries(path) <= STATE_LIBRARIES | {"state"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not libraries(path) & UNPICKLERS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save"), f"line {node.lineno}"
            assert "allow_pickle" not in [keyword.arg for keyword in node.keywords], f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_each_folder_says_in_a_line_or_two_what_belongs_there(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert 1 <= len(said.split("\n\n")[0].splitlines()) <= 2


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_table_knows_formats_by_name(path: Path) -> None:
    if path.is_relative_to(ROOT / "stages/formats"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare | ast.MatchValue):
            named = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
            assert not TABLE.keys() & {value for value in named if isinstance(value, str)}, (
                f"line {node.lineno}"
            )


@pytest.mark.parametrize("arguments", [["--help"], ["status", "nowhere"], ["calibrate", "--help"]], ids=str)
def test_help_and_status_do_without_torch(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pipeline.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt')))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
