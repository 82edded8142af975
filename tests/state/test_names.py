"""Names and their patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import InputError
from state.names import join_name, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head", ("lm_head", None, None)),
        ("model.layers.3.self_attn.q_proj", ("model.layers.L.self_attn.q_proj", 3, None)),
        ("model.layers.3.mlp.experts.17.up_proj", ("model.layers.L.mlp.experts.E.up_proj", 3, 17)),
        ("model.layers.3.mlp.experts.up_proj", ("model.layers.L.mlp.experts.up_proj", 3, None)),
        ("a.experts.2.b.5.c.7", ("a.experts.E.b.L.c.7", 5, 2)),
        ("a.1.experts.2.experts.3", ("a.L.experts.E.experts.3", 1, 2)),
        ("a.01.b.2", ("a.01.b.L", 2, None)),
        ("a.3.experts.w_quantizers.5", ("a.L.experts.w_quantizers.E", 3, 5)),
    ],
)
def test_split_name(name: str, expected: tuple[str, int | None, int | None]) -> None:
    assert split_name(name) == expected
    assert join_name(*expected) == name


@pytest.mark.parametrize("name", ["a.L.b", "E", "model.3.E"])
def test_names_that_patterns_cannot_tell_apart_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="patterns use"):
        split_name(name)


PARTS = st.one_of(
    st.sampled_from(["experts", "layers", "mlp", "0", "1", "27", "007", "x_quantizers", "٣", "-1"]),
    st.text(st.characters(exclude_characters="."), min_size=1, max_size=4).filter(
        lambda t: t not in ("L", "E")
    ),
)


@given(st.lists(PARTS, min_size=1, max_size=7).map(".".join))
def test_any_name_comes_back_from_its_pattern(name: str) -> None:
    assert join_name(*split_name(name)) == name
