"""What several tests of exports begin with."""

from pathlib import Path

import pytest

from tests.stages.export import support


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and run/, not to be written to."""
    scratch = tmp_path_factory.mktemp("made")
    support.make_model(scratch / "model", support.config_of("qwen3_moe"))
    support.make_run(scratch / "run", scratch / "model", support.make_text(scratch / "text.jsonl"))
    return scratch
