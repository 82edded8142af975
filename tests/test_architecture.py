"""Rules that keep the rooms apart: pipeline knows stages and state, stages knows state, state no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "stages", "state")
MAY_IMPORT = {"pipeline": {"pipeline", "stages", "state"}, "stages": {"stages", "state"}, "state": {"state"}}
STATE_LIBRARIES = {"numpy", "zarr", "pydantic", "xxhash", "filelock"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LONGEST = 400

FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Top-level names of the packages a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert set(imports(path)) & {*ROOMS, "tests", "benchmarks"} <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "state")], ids=name_of)
def test_state_needs_few_libraries(path: Path) -> None:
    assert set(imports(path)) <= STATE_LIBRARIES | {"state"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not set(imports(path)) & UNPICKLERS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save"), f"line {node.lineno}"
            assert "allow_pickle" not in [keyword.arg for keyword in node.keywords], f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert text == "" or ast.get_docstring(ast.parse(text))


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
