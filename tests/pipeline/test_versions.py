"""What is said of the installed libraries when something unexpected happens."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline import versions

REQUIRES = [
    "torch<2.14,>=2.11",
    "transformers<5.25,>=5.14",
    "nvidia-modelopt<0.48,>=0.47",
    'zarr<4; extra == "other"',
    "zarr<3.5,>=3.1.6",
]
TESTED = {"torch": "2.13.0+cpu", "transformers": "5.24.1", "nvidia-modelopt": "0.47.0", "zarr": "3.4.2"}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed packages, for a test to change."""
    packages = dict(TESTED)

    def version(package: str) -> str:
        if package not in packages:
            raise PackageNotFoundError(package)
        return packages[package]

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions, "requires", lambda package: REQUIRES)
    return packages


def test_tested_versions_leave_holdfast_to_blame(found: dict[str, str]) -> None:
    assert versions.report() == (
        "Installed are:\n"
        "  torch 2.13.0+cpu (in the tested range >=2.11,<2.14)\n"
        "  transformers 5.24.1 (in the tested range >=5.14,<5.25)\n"
        "  modelopt 0.47.0 (in the tested range >=0.47,<0.48)\n"
        "  zarr 3.4.2 (in the tested range >=3.1.6,<3.5)\n"
        "All were tested, so it is likely a fault of Holdfast: please report it, with these versions."
    )


def test_untested_and_missing_ones_come_with_the_command_that_mends_it(found: dict[str, str]) -> None:
    found.update({"transformers": "5.25.0.dev0", "nvidia-modelopt": "0.48.0"})
    del found["zarr"]
    said = versions.report()
    assert "  transformers 5.25.0.dev0 (NOT in the tested range >=5.14,<5.25)\n" in said
    assert "  zarr missing (NOT in the tested range >=3.1.6,<3.5)\n" in said
    assert said.endswith(
        "Untested versions are the likeliest reason. Install tested ones and give the same command again:\n"
        "  python -m pip install 'transformers>=5.14,<5.25' 'nvidia-modelopt>=0.47,<0.48' 'zarr>=3.1.6,<3.5'"
    )


def test_without_metadata_of_its_own(found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> list[str]:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(versions, "requires", missing)
    said = versions.report()
    assert "  torch 2.13.0+cpu (what was tested is not known)\n" in said
    assert said.splitlines()[-1].startswith("Install Holdfast as a package")


def test_this_environment_is_in_the_tested_ranges() -> None:
    assert [str(library) for library in versions.installed() if not library.was_tested] == []


def test_no_library_is_imported() -> None:
    program = (
        "import sys; from pipeline.versions import report; print(report()); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt', 'zarr')))"
    )
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
