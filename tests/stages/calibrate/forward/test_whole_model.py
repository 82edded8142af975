"""Which device is taken, and what is said of one that is not there."""

import pytest
import torch

from stages.calibrate.forward.whole_model import pick_device
from state.errors import InputError


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As many GPUs as far as counting goes; none of them works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def no_gpu(*_shape: int, device: torch.device) -> None:
    raise AssertionError(f"{device} is out of reach. Much more follows.\nAnd more.")


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_where_there_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch, "empty", no_gpu)
    with pytest.raises(InputError) as refused:
        pick_device(name)
    assert str(refused.value) == (
        f"DEVICE '{name}' can't be used: torch finds no GPU here ({name} is out of reach); "
        "use DEVICE=cpu or DEVICE=auto"
    )


def test_a_gpu_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 2)
    monkeypatch.setattr(torch, "empty", no_gpu)
    with pytest.raises(InputError) as refused:
        pick_device("cuda:2")
    assert str(refused.value) == (
        "DEVICE 'cuda:2' can't be used: cuda:2 is out of reach; "
        "use DEVICE=cuda:0, DEVICE=cuda:1, DEVICE=cpu or DEVICE=auto"
    )


def test_what_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 0)
    with pytest.raises(InputError, match=r"DEVICE 'abacus' .*abacus; use DEVICE=cpu or DEVICE=auto$"):
        pick_device("abacus")
