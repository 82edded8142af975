"""The ranges of pyproject.toml and the files of versions that were tested say the same."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
]
PYTHONS = ("3.11", "3.12", "3.13")


def pins(file: str, python: str) -> Iterator[tuple[str, Version]]:
    """Package and version of each line that holds for a version of Python on Linux."""
    environment = {**default_environment(), "python_version": python, "sys_platform": "linux"}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            yield canonicalize_name(requirement.name), Version(specifier.version)


def bound(requirement: Requirement, operator: str) -> Version:
    """The one bound of a requirement that has this operator."""
    (found,) = [one.version for one in requirement.specifier if one.operator == operator]
    return Version(found)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_range_has_both_ends(requirement: Requirement) -> None:
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}
    assert bound(requirement, ">=") < bound(requirement, "<")


def test_the_oldest_are_the_lower_bounds() -> None:
    lower = {canonicalize_name(one.name): bound(one, ">=") for one in REQUIREMENTS}
    torch = dict(pins("constraints.txt", "3.11"))["torch"]  # the one build for CPUs
    assert lower["torch"] <= torch
    assert dict(pins("constraints-oldest.txt", "3.11")) == {**lower, "torch": torch}


@pytest.mark.parametrize("python", PYTHONS)
def test_what_make_installs_is_pinned_once_and_in_the_ranges(python: str) -> None:
    listed = list(pins("constraints.txt", python))
    pinned = dict(listed)
    assert len(pinned) == len(listed)
    for requirement in REQUIREMENTS:
        if requirement.name == "triton":  # builds of torch for GPUs require a version of their own
            continue
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement.name


@pytest.mark.parametrize("python", PYTHONS)
def test_zarr_is_the_newest_that_this_python_can_have(python: str) -> None:
    pinned = dict(pins("constraints.txt", python))
    assert str(pinned["zarr"]) == ("3.1.6" if python == "3.11" else "3.4.2")
    assert ("msgspec" in pinned) == (python != "3.11")
