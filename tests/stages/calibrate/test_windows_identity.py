"""The windows that a run was begun with are those it goes on with, whatever decides about them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from stages.calibrate.forward.whole_model import load_tokenizer
from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.model.folder import tokenizer_digests
from stages.progress import Silent
from stages.settings import ExportSettings
from state.errors import IdentityMismatch
from state.reader import open_run
from tests.stages.calibrate import runs
from tests.stages.calibrate.runs import Crash, Interrupting, crash
from tests.stages.export import support

settings = partial(runs.settings, samples=8, batch=4, commit_every=1e-9)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    support.make_model(tmp_path / "model", support.config_of("qwen3_moe"))
    support.make_text(tmp_path / "text.jsonl")
    return tmp_path


def add_begin(folder: Path) -> int:
    """Have the tokenizer begin every text with its first token, which is returned."""
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = words.id_to_token(0)
    words.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    words.save(str(folder / "tokenizer.json"))
    return 0


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(inputs: Path) -> None:
    begin = add_begin(inputs / "model")
    calibrate(settings(inputs, inputs / "run"), Silent())
    tokens = open_run(inputs / "run").tokens
    assert tokens.shape == (8, 32)
    assert (tokens[:, 0] == begin).all()


def test_windows_taken_elsewhere_are_other_content(inputs: Path) -> None:
    calibrate(settings(inputs, inputs / "run"), Silent())
    with pytest.raises(
        IdentityMismatch, match=r"\n  tokens: stored I32\[8,32\] xxh3:.*, now I32\[8,32\] xxh3:"
    ):
        calibrate(settings(inputs, inputs / "run", take="spread"), Silent())
    calibrate(settings(inputs, inputs / "other", take="spread"), Silent())
    first, spread = (open_run(inputs / name).tokens for name in ("run", "other"))
    np.testing.assert_array_equal(first[0], spread[0])
    assert not np.array_equal(first, spread)


def test_stored_windows_are_not_taken_for_others(inputs: Path) -> None:
    with pytest.raises(Crash):
        calibrate(settings(inputs, inputs / "run"), Interrupting(1, crash))
    (inputs / "text.jsonl").unlink()
    with pytest.raises(IdentityMismatch, match=r"can't be reached.*\n  take: stored first, now spread\n"):
        calibrate(settings(inputs, inputs / "run", take="spread"), Silent())
    calibrate(settings(inputs, inputs / "run"), Silent())


def test_tekken_is_part_of_the_tokenizer(inputs: Path) -> None:
    (inputs / "model/tekken.json").write_text("{}")
    assert "tekken.json" in tokenizer_digests(inputs / "model")
    calibrate(settings(inputs, inputs / "run"), Silent())
    (inputs / "model/tekken.json").write_text("[]")
    with pytest.raises(IdentityMismatch, match=r"tokenizer\.tekken\.json: stored xxh3:.*, now xxh3:"):
        calibrate(settings(inputs, inputs / "run"), Silent())
    with pytest.raises(IdentityMismatch, match=r"tokenizer\.tekken\.json: stored xxh3:.*, now xxh3:"):
        export(ExportSettings(run=inputs / "run", out=inputs / "out"), Silent())


def test_a_run_that_does_not_name_tekken_is_still_exported(inputs: Path) -> None:
    calibrate(settings(inputs, inputs / "run"), Silent())
    (inputs / "model/tekken.json").write_text("{}")
    export(ExportSettings(run=inputs / "run", out=inputs / "out"), Silent())


def test_the_template_of_a_processor_serves_where_the_tokenizer_has_none(inputs: Path) -> None:
    assert load_tokenizer(inputs / "model").chat_template is None
    (inputs / "model/chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(inputs / "model").chat_template == "{{ messages }}"
