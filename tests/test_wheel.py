"""What a stranger installs: the wheel, in an environment of its own, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("holdfast", "pipeline", "stages", "state", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

READS = """
from pathlib import Path
import holdfast
assert Path(holdfast.__file__).is_relative_to({environment!r}), holdfast.__file__
run = holdfast.open("runs/demo")
assert run.head.finished
print(holdfast.__version__, run.amax("model.layers.2.mlp.experts.17.down_proj").shape)
"""

TYPED = """
from pathlib import Path
import holdfast
reveal_type(holdfast.open("runs/demo").head.number)
reveal_type(holdfast.export(holdfast.ExportSettings(run=Path("a"), out=Path("b"))).nbytes)
holdfast.calibrate("runs/demo")
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command that knows nothing of the checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKELEVEL")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=env | {"COLUMNS": "120"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which sees the libraries installed here but no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for name in BUILT_FROM:  # a copy: setuptools would find what earlier builds left in the checkout
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, source / name)
    pip = (sys.executable, "-m", "pip")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    built = run(*pip, "wheel", *options, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("holdfast-*.whl")
    made = run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    assert made.returncode == 0, made.stderr
    installed = run(*pip, "--python", venv / "bin/python", "install", "--no-deps", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    # Only now, or pip would find Holdfast installed already. `.pth` files of a folder named by one are not
    # read, so the checkout, which is installed by such a file, stays out of sight.
    libraries = venv / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_the_two_commands_work(environment: Path, tmp_path: Path) -> None:
    python, holdfast = environment / "bin/python", environment / "bin/holdfast"
    for command in ([holdfast, "--help"], [python, "-m", "holdfast", "--help"]):
        helped = run(*command, cwd=tmp_path)
        assert (helped.returncode, "calibrate" in helped.stdout) == (0, True), helped.stderr
    calibrate = ("calibrate", "demo/model", "demo/text.jsonl", "runs/demo", "--samples", "8", "--seq", "64")
    for command in (
        [python, "-m", "pipeline.demo", "demo"],
        [holdfast, *calibrate],
        [holdfast, "export", "runs/demo", "exports/demo"],
        [holdfast, "status", "runs/demo"],
    ):
        ended = run(*command, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "exports/demo/hf_quant_config.json").exists()
    read = run(python, "-c", READS.format(environment=str(environment)), cwd=tmp_path)
    assert read.stdout.splitlines() == ["0.1.0 (64,)"], read.stderr


def test_types_are_read_from_it(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TYPED)
    python = str(environment / "bin/python")
    checked = run(
        sys.executable, "-m", "mypy", "--python-executable", python, "program.py", cwd=tmp_path
    ).stdout
    assert checked.count('Revealed type is "int"') + checked.count('"builtins.int"') == 2, checked
    assert 'incompatible type "str"; expected "CalibrateSettings"' in checked
    assert "Found 1 error in 1 file" in checked, checked
