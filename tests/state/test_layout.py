import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from state.errors import InputError
from state.layout import Layout, Relation, SiteArray, arrange
from state.names import Role, Site, join_name

GATE = "model.layers.L.mlp.experts.E.gate_proj"
UP = "model.layers.L.mlp.experts.E.up_proj"
STATISTICS: dict[Role, tuple[str, ...]] = {"input": ("amax", "tokens"), "weight": ("weight_amax",)}


def experts_input(layer: int, experts: int, channels: int = 4) -> dict[Site, int | None]:
    return {Site(join_name(GATE, layer, expert), "input"): channels for expert in range(experts)}


def test_arrange_groups_by_pattern_role_and_shape() -> None:
    channels: dict[Site, int | None] = {
        Site("lm_head", "input"): 8,
        **experts_input(5, 2),
        **experts_input(1, 2),
        Site("model.layers.1.q", "input"): 3,
        Site("model.layers.2.q", "input"): 6,
        Site("model.layers.1.q", "weight"): None,
    }
    arrays = {array.key: array for array in arrange(channels, STATISTICS)}
    assert list(arrays) == [
        "lm_head.input",
        f"{GATE}.input",
        "model.layers.L.q.input@3",
        "model.layers.L.q.input@6",
        "model.layers.L.q.weight",
    ]
    gate = arrays[f"{GATE}.input"]
    assert (gate.layers, gate.experts, gate.channels) == ((1, 5), 2, 4)
    assert (gate.shape("amax"), gate.axes("amax")) == ((2, 2, 4), ("layer", "expert", "channel"))
    assert (gate.shape("tokens"), gate.axes("tokens")) == ((2, 2), ("layer", "expert"))
    assert arrays["lm_head.input"].shape("amax") == (8,)
    assert arrays["lm_head.input"].shape("tokens") == ()
    assert arrays["model.layers.L.q.weight"].shape("weight_amax") == (1,)


def test_arrange_tells_expert_counts_apart() -> None:
    arrays = arrange(experts_input(0, 2) | experts_input(1, 3), STATISTICS)
    assert [array.key for array in arrays] == [f"{GATE}.input@2x4", f"{GATE}.input@3x4"]


def test_arrange_refuses_experts_with_gaps() -> None:
    sites: dict[Site, int | None] = {Site(join_name(GATE, 0, expert), "input"): 4 for expert in (0, 2)}
    with pytest.raises(InputError, match="not numbered in order"):
        arrange(sites, STATISTICS)


MODULES = st.builds(
    lambda stem, layer, expert: join_name(
        ".".join([stem, *(["L"] if layer is not None else []), *(["experts", "E"] if expert else [])]),
        layer,
        0 if expert else None,
    ),
    st.sampled_from(["a", "b.c"]),
    st.none() | st.integers(0, 60),
    st.booleans(),
)


@given(
    st.dictionaries(
        st.builds(Site, MODULES, st.sampled_from(["input", "k", "weight"])), st.none() | st.integers(1, 3)
    )
)
def test_layout_round_trip(channels: dict[Site, int | None]) -> None:
    statistics: dict[Role, tuple[str, ...]] = {"input": ("amax",), "k": ("amax",), "weight": ("weight_amax",)}
    layout = Layout(arrays=arrange(channels, statistics))
    assert Layout.model_validate_json(layout.model_dump_json()) == layout
    places = set()
    for site, width in channels.items():
        array, index = layout.locate(site)
        assert array.channels == width
        assert len(index) == len(array.axes("weight_amax"))
        places.add((array.key, index))
    assert len(places) == len(channels)
    assert {site for array in layout.arrays for site in array.sites()} == set(channels)


def test_locate_by_alias_and_its_errors() -> None:
    layout = Layout(
        arrays=arrange(experts_input(2, 3) | {Site("model.layers.2.shared", "input"): 4}, STATISTICS),
        aliases={
            f"{UP}.input": f"{GATE}.input",
            "model.layers.L.mlp.experts.E.down_proj.input": "model.layers.L.shared.input",
        },
    )
    array, index = layout.locate(Site("model.layers.2.mlp.experts.1.up_proj", "input"))
    assert (array.pattern, index) == (GATE, (0, 1))
    array, index = layout.locate(Site("model.layers.2.mlp.experts.1.down_proj", "input"))
    assert (array.pattern, index) == ("model.layers.L.shared", (0,))
    with pytest.raises(InputError, match="numbered 0 to 2"):
        layout.locate(Site("model.layers.2.mlp.experts.3.gate_proj", "input"))
    with pytest.raises(InputError, match="numbered 0 to 2"):
        layout.locate(Site("model.layers.2.mlp.experts.9.up_proj", "input"))
    with pytest.raises(InputError, match="layers 2 to 2"):
        layout.locate(Site("model.layers.7.mlp.experts.0.gate_proj", "input"))
    with pytest.raises(
        InputError, match=r"Near names: model\.layers\.2\.mlp\.experts\.0\.gate_proj \(input\)"
    ):
        layout.locate(Site("model.layers.2.mlp.experts.0.gat_proj", "input"))


def test_groups_expand_layers_and_experts() -> None:
    layout = Layout(
        arrays=arrange(experts_input(0, 2) | experts_input(3, 2), STATISTICS),
        aliases={f"{UP}.input": f"{GATE}.input"},
        relations=(
            Relation(kind="engine_fused", members=(GATE, UP), layers=(0, 3)),
            Relation(kind="same_input", members=("model.layers.L.q", "model.layers.L.k"), layers=(3,)),
            Relation(kind="norm_consumers", norm="n", members=("model.layers.L.router", GATE), layers=(0,)),
            Relation(kind="norm_consumers", norm="m", members=(GATE, UP), layers=(3,)),
            Relation(kind="same_input", members=("lm_head", "other")),
        ),
    )
    assert layout.groups("engine_fused") == [
        (f"model.layers.{layer}.mlp.experts.{e}.gate_proj", f"model.layers.{layer}.mlp.experts.{e}.up_proj")
        for layer in (0, 3)
        for e in (0, 1)
    ]
    assert layout.groups("same_input") == [("model.layers.3.q", "model.layers.3.k"), ("lm_head", "other")]
    assert layout.groups("norm_consumers") == [
        (
            "model.layers.0.router",
            "model.layers.0.mlp.experts.0.gate_proj",
            "model.layers.0.mlp.experts.1.gate_proj",
        ),
        (
            "model.layers.3.mlp.experts.0.gate_proj",
            "model.layers.3.mlp.experts.1.gate_proj",
            "model.layers.3.mlp.experts.0.up_proj",
            "model.layers.3.mlp.experts.1.up_proj",
        ),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "a.L", "layers": ()},
        {"pattern": "a", "layers": (1,)},
        {"pattern": "a.L", "layers": (2, 1)},
        {"pattern": "a.L", "layers": (1, 1)},
        {"pattern": "a.experts.E", "experts": None},
        {"pattern": "a", "experts": 2},
        {"pattern": "a", "statistics": ("histogram",)},
        {"pattern": "a", "surprise": 1},
    ],
)
def test_inconsistent_arrays_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SiteArray.model_validate({"role": "input", "statistics": ("amax",), **fields})


def test_a_layout_never_has_two_places_for_a_site() -> None:
    one = SiteArray(pattern="a.L", role="input", layers=(0, 1), channels=2, statistics=("amax",))
    other = SiteArray(
        pattern="a.L", role="input", layers=(1,), channels=3, statistics=("amax",), several_shapes=True
    )
    with pytest.raises(ValidationError, match="same layer"):
        Layout(arrays=(one, other))
    with pytest.raises(ValidationError, match="same key"):
        Layout(arrays=(one, one))
