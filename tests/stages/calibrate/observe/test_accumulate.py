"""Statistics as they grow, and their form in the store."""

import numpy as np
import torch

from stages.calibrate.observe.accumulate import Accumulators
from stages.calibrate.observe.arrays import ACTIVATIONS
from state.layout import Layout, SiteArray

LINEAR = SiteArray(pattern="layers.L.q_proj", role="input", layers=(0, 5), channels=2, statistics=ACTIVATIONS)
EXPERT = SiteArray(
    pattern="layers.L.experts.E.up_proj",
    role="input",
    layers=(0,),
    experts=3,
    channels=2,
    statistics=ACTIVATIONS,
)
WEIGHT = SiteArray(pattern="layers.L.q_proj", role="weight", layers=(0, 5), statistics=("weight_amax",))
LAYOUT = Layout(arrays=(LINEAR, EXPERT, WEIGHT))
CPU = torch.device("cpu")


def filled() -> Accumulators:
    statistics = Accumulators(LAYOUT, CPU)
    statistics.add(LINEAR, (1,), torch.tensor([[[1.0, -2.0], [0.0, 1.0]]]))
    statistics.add(LINEAR, (1,), torch.tensor([[-3.0, 0.0]]))
    statistics.add_experts(EXPERT, (0,), torch.tensor([[4.0, 0.0], [-5.0, 0.0]]), torch.tensor([2, 2, 2]))
    statistics.add(EXPERT, (0, 2), torch.tensor([[6.0, 7.0]]))
    statistics.set_weight(WEIGHT, (0,), 0.5)
    return statistics


def test_snapshot_has_the_marks_of_the_store() -> None:
    arrays = filled().snapshot()
    nan = np.nan
    np.testing.assert_array_equal(arrays["amax/layers.L.q_proj.input"], [[nan, nan], [3, 2]])
    np.testing.assert_array_equal(arrays["abs_sum/layers.L.q_proj.input"], [[nan, nan], [4, 3]])
    np.testing.assert_array_equal(arrays["tokens/layers.L.q_proj.input"], [-1, 3])
    np.testing.assert_array_equal(
        arrays["amax/layers.L.experts.E.up_proj.input"], [[[5, 0], [nan, nan], [6, 7]]]
    )
    np.testing.assert_array_equal(arrays["tokens/layers.L.experts.E.up_proj.input"], [[2, -1, 1]])
    np.testing.assert_array_equal(arrays["weight_amax/layers.L.q_proj.weight"], [0.5, nan])
    assert arrays["amax/layers.L.q_proj.input"].dtype == np.float32
    assert arrays["abs_sum/layers.L.q_proj.input"].dtype == np.float64
    assert arrays["tokens/layers.L.q_proj.input"].dtype == np.int64


def test_going_on_from_a_snapshot_equals_never_having_stopped() -> None:
    resumed = Accumulators(LAYOUT, CPU, filled().snapshot())
    straight = filled()
    for statistics in (resumed, straight):
        statistics.add(LINEAR, (0,), torch.tensor([[0.1, 0.2]]))
        statistics.add_experts(EXPERT, (0,), torch.tensor([[9.0, 0.3]]), torch.tensor([0, 1, 1]))
    for path, values in straight.snapshot().items():
        np.testing.assert_array_equal(resumed.snapshot()[path], values)


def test_snapshot_is_a_copy() -> None:
    statistics = filled()
    snapshot = statistics.snapshot()
    statistics.add(LINEAR, (1,), torch.tensor([[100.0, 100.0]]))
    assert snapshot["amax/layers.L.q_proj.input"][1].tolist() == [3, 2]


def test_a_computed_nan_is_stored_as_infinite_not_as_never_observed() -> None:
    statistics = Accumulators(LAYOUT, CPU)
    statistics.add(LINEAR, (0,), torch.tensor([[float("nan"), 1.0]]))
    statistics.add(LINEAR, (0,), torch.tensor([[2.0, 2.0]]))
    assert statistics.snapshot()["amax/layers.L.q_proj.input"][0].tolist() == [np.inf, 2.0]


def test_no_tokens_is_no_observation() -> None:
    statistics = Accumulators(LAYOUT, CPU)
    statistics.add(LINEAR, (0,), torch.empty(0, 2))
    assert statistics.snapshot()["tokens/layers.L.q_proj.input"].tolist() == [-1, -1]
