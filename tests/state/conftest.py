"""Fixtures of the store's tests."""

from pathlib import Path

import pytest

from tests.state import driver


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip real fsyncs, which only a real power cut would tell from none: hundreds of them take minutes."""
    monkeypatch.setattr("state.durable.os.fsync", lambda descriptor: None)


@pytest.fixture
def finished(tmp_path: Path, unsynced: None) -> Path:
    """A finished run of the driver."""
    run = tmp_path / "run"
    driver.drive(run)
    return run


@pytest.fixture
def halfway(tmp_path: Path, unsynced: None) -> Path:
    """A run with two of four batches committed."""
    run = tmp_path / "run"
    driver.drive(run, until=2)
    return run
