"""An export that a signal stops at any operation: the same command goes on and ends in the same bytes."""

import signal
from pathlib import Path

import pytest

from stages.calibrate.signals import Interrupted, stop_on_signal
from stages.export.run import export
from stages.settings import ExportSettings
from state.durable import Disk
from tests.stages.export.kill_driver import tree


class SignalAt(Disk):
    """Sends this process a signal ahead of the operation of some number."""

    def __init__(self, number: int, name: signal.Signals) -> None:
        self.left, self.name = number, name

    def before(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.name)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("number", [1, 4, 9, 14])
def test_an_export_goes_on_after_a_signal(
    made: Path, tmp_path: Path, name: signal.Signals, number: int
) -> None:
    def asked(out: str) -> ExportSettings:
        return ExportSettings(run=made / "run", out=tmp_path / out, shard_size=20_000)

    with pytest.raises(Interrupted, match=name.name), stop_on_signal():
        export(asked("out"), disk=SignalAt(number, name))
    assert not (tmp_path / "out").exists()
    export(asked("out"))
    export(asked("undisturbed"))
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")
