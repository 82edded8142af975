"""Which versions of the libraries that matter most are installed, and whether those were tested.

All of it is read from the metadata of installed packages, of which none is imported.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGES = {"torch": "torch", "transformers": "transformers", "modelopt": "nvidia-modelopt", "zarr": "zarr"}
"""Library → the package that it comes in."""


@dataclass(frozen=True)
class Library:
    """A library as installed. version: None where it is missing. tested: None where Holdfast itself is not
    installed as a package, so that its metadata can't tell.
    """

    name: str
    version: str | None
    tested: SpecifierSet | None

    @property
    def was_tested(self) -> bool:
        """Whether the installed version is in the tested range."""
        return (
            self.version is not None
            and self.tested is not None
            and self.tested.contains(self.version, prereleases=True)
        )

    def tested_range(self) -> str:
        """The range as pip takes it, its lower bound first: `>=3.1,<4`."""
        return ",".join(sorted(map(str, self.tested or ()), reverse=True))

    def __str__(self) -> str:
        if self.tested is None:
            return f"{self.name} {self.version or 'missing'} (what was tested is not known)"
        state = "in" if self.was_tested else "NOT in"
        return f"{self.name} {self.version or 'missing'} ({state} the tested range {self.tested_range()})"


def installed() -> list[Library]:
    """Each library of `PACKAGES`."""
    tested = _tested()
    return [Library(name, _version(package), tested.get(package)) for name, package in PACKAGES.items()]


def report() -> str:
    """The versions, a line each, and what to do about those that were not tested."""
    libraries = installed()
    lines = ["Installed are:", *(f"  {library}" for library in libraries)]
    others = [library for library in libraries if not library.was_tested]
    wanted = " ".join(
        f"'{PACKAGES[one.name]}{one.tested_range()}'" for one in others if one.tested is not None
    )
    if wanted:
        lines.append(
            "Untested versions are the likeliest reason. Install tested ones and give the same command again:"
        )
        lines.append(f"  python -m pip install {wanted}")
    elif others:
        lines.append("Install Holdfast as a package: python -m pip install FOLDER, of its pyproject.toml.")
    else:
        lines.append(
            "All were tested, so it is likely a fault of Holdfast: please report it, with these versions."
        )
    return "\n".join(lines)


def _tested() -> dict[str, SpecifierSet]:
    """Package → range, of what Holdfast requires in this environment; empty where it is not installed."""
    try:
        requirements = [Requirement(text) for text in requires("holdfast") or ()]
    except PackageNotFoundError:
        return {}
    return {
        requirement.name: requirement.specifier
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
