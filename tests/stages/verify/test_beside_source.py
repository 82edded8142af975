"""What is compared with the model that a checkpoint was made from, and what only numbers can tell."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stages.verify.conftest import RECIPES
from tests.stages.verify.editable import copied, damaged, verified
from tests.stages.verify.mutations import FOUND_BESIDE_THE_SOURCE, LEFT_TO_NUMBERS

Good = Callable[[str], Path]


def source_of(sources: Path, name: str) -> str:
    return str(sources / ("layers" if name == "layers" else "moe"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_good_checkpoint_is_its_source_quantized(
    good: Good, sources: Path, tmp_path: Path, name: str
) -> None:
    report = verified(copied(good(name), tmp_path / "out"), model=source_of(sources, name))
    assert (report.findings, report.left_out) == ((), ())


@pytest.mark.parametrize("name", FOUND_BESIDE_THE_SOURCE)
def test_damage_is_found_beside_the_source_alone(
    good: Good, sources: Path, tmp_path: Path, name: str
) -> None:
    mutation = FOUND_BESIDE_THE_SOURCE[name]
    out = damaged(good(mutation.good), tmp_path / "out", mutation.edit)
    report = verified(out, model=source_of(sources, mutation.good))
    assert (mutation.rule, mutation.name) in {(found.rule, found.name) for found in report.findings}
    assert verified(out).findings == ()


@pytest.mark.parametrize("name", LEFT_TO_NUMBERS)
def test_what_only_numbers_can_tell(good: Good, sources: Path, tmp_path: Path, name: str) -> None:
    out = damaged(good("nvfp4"), tmp_path / "out", LEFT_TO_NUMBERS[name])
    assert verified(out, model=source_of(sources, "nvfp4")).findings == ()


def test_without_the_source_the_report_says_so(good: Good, tmp_path: Path) -> None:
    report = verified(copied(good("fp8"), tmp_path / "out"))
    assert report.left_out == ("whether weights are the source's: give it as --model",)
