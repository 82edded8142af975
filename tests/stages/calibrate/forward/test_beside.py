"""The stream beside the layers' own."""

import pytest
import torch

from stages.calibrate.forward.beside import Beside

LONG = 500_000_000  # cycles of a GPU: a quarter of a second and more


def test_on_a_cpu_everything_runs_in_order():
    beside, values = Beside(torch.device("cpu")), torch.ones(2)
    with beside.run():
        values += 1
    beside.join([values])
    beside.follow([values])
    assert values.tolist() == [2.0, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_look_beside_does_not_wait_for_the_main_stream():
    beside = Beside(torch.device("cuda"))
    values = torch.ones(2, device="cuda")
    assert values.sum().item() == 2  # loading a kernel would wait for everything
    torch.cuda._sleep(LONG)
    slept = torch.cuda.current_stream().record_event()
    with beside.run():
        assert values.sum().item() == 2
    assert not slept.query()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_stream_sees_what_the_other_made_before():
    beside, values = Beside(torch.device("cuda")), torch.zeros(1, device="cuda")
    torch.cuda._sleep(LONG)
    values += 1
    beside.follow([values])
    with beside.run():
        torch.cuda._sleep(LONG)
        doubled = values * 2
    beside.join([doubled])
    assert (doubled + values).item() == 3
