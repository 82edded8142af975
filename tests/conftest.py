"""What all tests share: no network, Triton's interpreter where there is no GPU, a tiny model to work on."""

import os
import signal
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a library imports triton, which has kernels too


@pytest.fixture(autouse=True)
def _not_through_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are suggested as for `holdfast` itself, also where make runs the tests."""
    monkeypatch.delenv("MAKELEVEL", raising=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the trained test model and its texts, where HOLDFAST_SHARED names one."""
    folder = os.environ.get("HOLDFAST_SHARED")
    if not folder:
        pytest.skip("HOLDFAST_SHARED is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's `model` (a tiny Qwen3-MoE) and `text.jsonl`. Read only."""
    from pipeline.demo import make_demo

    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder)
    return folder


# A test run in the background of a script inherits SIGINT as ignored, which commands honour and tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
