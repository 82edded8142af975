"""Which solutions were made behind others than there are, from literal digests."""

from typing import Any

import numpy as np
import pytest

from stages.recipe.chain import links, outdated, told

Chain = dict[int, dict[str, Any]]


def solution(own: str, **behind: str) -> dict[str, Any]:
    return {"digest": own, "behind": {layer.removeprefix("of"): digest for layer, digest in behind.items()}}


WHOLE: Chain = {0: solution("a"), 2: solution("b", of0="a"), 3: solution("c", of0="a", of2="b")}


def test_a_solution_names_what_it_was_made_behind() -> None:
    arrays = {"up@values": np.array([[1, 2]], np.int8), "up@amax": np.float32([3.0])}
    first = links(arrays, {})
    assert first["behind"] == {} and first["digest"].startswith("xxh3:")
    second = links(arrays, {7: first, 3: solution("b")})
    assert second == {"digest": first["digest"], "behind": {"3": "b", "7": first["digest"]}}


@pytest.mark.parametrize(
    "other",
    [
        {"up@values": np.array([[1, 3]], np.int8)},
        {"up@values": np.array([1, 2], np.int8)},
        {"up@values": np.array([[1, 2]], np.uint8)},
        {"down@values": np.array([[1, 2]], np.int8)},
        {"up@values": np.array([[1, 2]], np.int8), "up@amax": np.float32([3.0])},
    ],
    ids=["value", "shape", "dtype", "name", "more"],
)
def test_the_digest_is_of_all_that_the_arrays_are(other: dict[str, Any]) -> None:
    arrays = {"up@values": np.array([[1, 2]], np.int8)}
    assert links(arrays, {})["digest"] != links(other, {})["digest"]
    turned = {"up@values": np.asfortranarray(arrays["up@values"].repeat(2, 0))}
    assert links(turned, {}) == links({"up@values": np.ascontiguousarray(turned["up@values"])}, {})


def test_a_whole_chain_holds() -> None:
    assert outdated(WHOLE) == {} and outdated({}) == {}


def test_all_behind_one_that_came_out_otherwise_are_outdated() -> None:
    assert outdated(WHOLE | {2: solution("x", of0="a")}) == {3: 2}
    assert outdated(WHOLE | {0: solution("x")}) == {2: 0, 3: 0}


def test_of_a_layer_without_a_solution_nothing_is_known_yet() -> None:
    lost = {layer: found for layer, found in WHOLE.items() if layer != 0}
    assert outdated(lost) == {} and outdated(lost | {2: solution("x", of0="a")}) == {3: 2}


def test_a_solution_that_was_made_without_an_earlier_one_is_outdated() -> None:
    assert outdated(WHOLE | {1: solution("d", of0="a")}) == {2: 1, 3: 1}


def test_solutions_of_one_stream_are_made_behind_none() -> None:
    assert outdated({0: {"method": "awq_lite"}, 1: {"method": "awq_lite"}}) == {}


def test_what_is_outdated_is_named() -> None:
    assert told({3: 2}) == "layer 3 was solved behind another solution of layer 2 than there is now"
    assert told({2: 0, 3: 0}) == (
        "layers 2, 3 were solved behind another solution of layer 0 than there is now"
    )
    assert told({2: 0, 3: 1}) == (
        "layers 2, 3 were solved behind other solutions of layers 0, 1 than there are now"
    )
