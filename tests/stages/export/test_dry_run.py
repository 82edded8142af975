"""An export that is only asked about: all of the plan, and nothing in OUT."""

from pathlib import Path

import pytest

from pipeline.summary import print_export
from stages.export.run import export
from stages.settings import ExportSettings
from state.errors import IdentityMismatch
from tests.stages.export.kill_driver import tree


def ask(made: Path, out: Path, dry_run: bool = True, **more: object) -> object:
    given = {"run": made / "run", "out": out, "shard_size": 50_000, "dry_run": dry_run} | more
    return export(ExportSettings.model_validate(given))


def test_it_says_what_would_be_written(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ask(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    print_export(asked, tmp_path / "out")
    shown = capsys.readouterr().out
    written = ask(made, tmp_path / "out", dry_run=False)
    assert asked.shards == written.shards and asked.formats == written.formats
    assert asked.needs.disk >= asked.nbytes and asked.needs.free > 0
    assert 1e6 < asked.needs.memory < 1e9
    assert all(name in shown for name in written.shards) and "above the imports" in shown


def test_a_finished_one_is_known_and_another_is_refused(made: Path, tmp_path: Path) -> None:
    ask(made, tmp_path / "out", dry_run=False)
    before = tree(tmp_path)
    assert ask(made, tmp_path / "out").already_finished
    with pytest.raises(IdentityMismatch):
        ask(made, tmp_path / "out", recipe="fp8")
    assert ask(made, tmp_path / "out", recipe="fp8", overwrite=True).already_finished is False
    assert tree(tmp_path) == before
