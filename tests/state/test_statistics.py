import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from state.statistics import STATISTICS, empty, merge

NAN = float("nan")


def test_the_registered_statistics() -> None:
    assert {name: (one.dtype, one.merge, one.per_channel) for name, one in STATISTICS.items()} == {
        "amax": ("float32", "max", True),
        "abs_sum": ("float64", "sum", True),
        "tokens": ("int64", "sum", False),
        "weight_amax": ("float32", "max", False),
    }


def test_empty_is_never_observed_and_never_zero() -> None:
    for name in STATISTICS:
        values = empty(name, (2,))
        assert values.dtype == STATISTICS[name].dtype
        assert not (values == 0).any()
    np.testing.assert_array_equal(empty("tokens", (2,)), [-1, -1])


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("amax", [1.0, NAN, 3.0, NAN, 0.0], [2.0, 5.0, NAN, NAN, NAN], [2.0, 5.0, 3.0, NAN, 0.0]),
        ("weight_amax", [1.0, NAN], [0.5, 0.0], [1.0, 0.0]),
        ("abs_sum", [1.0, NAN, 3.0, NAN, 0.0], [2.0, 5.0, NAN, NAN, 0.0], [3.0, 5.0, 3.0, NAN, 0.0]),
        ("tokens", [1, -1, 3, -1, 0], [2, 5, -1, -1, -1], [3, 5, 3, -1, 0]),
    ],
)
def test_merge(name: str, a: list[float], b: list[float], expected: list[float]) -> None:
    dtype = STATISTICS[name].dtype
    merged = merge(name, np.array(a, dtype), np.array(b, dtype))
    np.testing.assert_array_equal(merged, np.array(expected, dtype))
    assert merged.dtype == dtype


def test_merge_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match="amax is float32"):
        merge("amax", np.zeros(2, np.float64), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="shapes"):
        merge("amax", np.zeros(2, np.float32), np.zeros(3, np.float32))


def parts_of(name: str) -> st.SearchStrategy[list[np.ndarray]]:
    dtype = np.dtype(STATISTICS[name].dtype)
    # Whole numbers, so that every order of a sum is exact.
    observed = st.integers(0, 2**20)
    value = st.one_of(st.just(STATISTICS[name].fill), observed)
    part = hnp.arrays(dtype, 3, elements=value.map(dtype.type))
    return st.lists(part, min_size=1, max_size=6)


@given(name=st.sampled_from(sorted(STATISTICS)), data=st.data(), seed=st.integers(0, 2**32))
def test_any_split_and_order_merges_to_the_same(name: str, data: st.DataObject, seed: int) -> None:
    parts = data.draw(parts_of(name))
    in_order = empty(name, (3,))
    for part in parts:
        in_order = merge(name, in_order, part)

    chance = random.Random(seed)
    heap = list(parts)
    while len(heap) > 1:
        chance.shuffle(heap)
        heap.append(merge(name, heap.pop(), heap.pop()))
    np.testing.assert_array_equal(heap[0], in_order)
