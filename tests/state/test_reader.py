from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from state.claim import create_run
from state.errors import InputError
from state.head import Cursor
from state.layout import Layout, arrange
from state.names import Role, Site
from state.reader import Calibration, open_run
from state.statistics import empty
from state.update import Generation, Update
from tests.state import driver

NAN = float("nan")
ATTENTION = "model.layers.{}.self_attn"
EXPERT = "model.layers.{}.mlp.experts.{}"
GATE, UP = "model.layers.L.mlp.experts.E.gate_proj", "model.layers.L.mlp.experts.E.up_proj"

AMAX: dict[Site, list[float] | float] = {
    Site("lm_head", "input"): [0.5, 0.0],
    Site("lm_head", "weight"): 9.0,
    Site(ATTENTION.format(3) + ".q_proj", "input"): [1.0, 2.0],
    Site(ATTENTION.format(5) + ".q_proj", "input"): [3.0, NAN],
    Site(ATTENTION.format(5), "k"): [4.0, 5.0],
    Site(ATTENTION.format(5), "v"): [6.0, 7.0],
    Site(EXPERT.format(5, 0) + ".gate_proj", "input"): [1.0, NAN],
    Site(EXPERT.format(5, 1) + ".gate_proj", "input"): [0.5, NAN],
    Site(EXPERT.format(5, 2) + ".gate_proj", "input"): [NAN, NAN],
    **{Site(EXPERT.format(5, expert) + ".gate_proj", "weight"): 1.0 + expert for expert in range(3)},
    **{Site(EXPERT.format(5, expert) + ".up_proj", "weight"): 3.0 - expert for expert in range(3)},
    Site("model.layers.5.mlp.fused", "input"): 8.0,
}


def layout() -> Layout:
    statistics: dict[Role, tuple[str, ...]] = {
        "input": ("amax",), "k": ("amax",), "v": ("amax",), "weight": ("weight_amax",),
    }  # fmt: skip
    widths = {site: len(amax) if isinstance(amax, list) else None for site, amax in AMAX.items()}
    return Layout(
        arrays=arrange(widths, statistics),
        aliases={
            "model.layers.L.self_attn.k_proj.input": "model.layers.L.self_attn.q_proj.input",
            f"{UP}.input": f"{GATE}.input",
            "model.layers.L.mlp.experts.E.down_proj.input": "model.layers.L.mlp.fused.input",
        },
        quantizers={
            "model.layers.L.mlp.experts.gate_up_proj_input_quantizer": (f"{GATE}.input",),
            "model.layers.L.mlp.experts.gate_up_proj_weight_quantizers.E": (f"{GATE}.weight", f"{UP}.weight"),
            "model.layers.L.mlp.experts.down_proj_input_quantizer": (
                "model.layers.L.mlp.experts.E.down_proj.input",
            ),
            "memory.L.attention.query.input_quantizer": ("model.layers.L.self_attn.q_proj.input",),
        },
    )


def arrays_of(layout: Layout, amax: Mapping[Site, list[float] | float]) -> dict[str, np.ndarray]:
    arrays = {
        f"{one.statistics[0]}/{one.key}": empty("amax", one.shape(one.statistics[0])) for one in layout.arrays
    }
    for site, values in amax.items():
        array, index = layout.locate(site)
        arrays[f"{array.statistics[0]}/{array.key}"][index] = values
    return arrays


@pytest.fixture
def reader(tmp_path: Path, unsynced: None) -> Calibration:
    with create_run(tmp_path / "run", driver.RECORD, driver.TOKENS) as writer:
        writer.commit(Update(Cursor(), True, Generation(layout(), arrays_of(layout(), AMAX))))
    return open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head", [0.5, 0.0]),
        ("lm_head.input_quantizer", [0.5, 0.0]),
        ("lm_head.weight_quantizer", 9.0),
        ("model.layers.5.self_attn.q_proj.input_quantizer", [3.0, NAN]),
        ("model.layers.3.self_attn.k_proj.input_quantizer", [1.0, 2.0]),
        ("model.layers.5.self_attn.k_bmm_quantizer", [4.0, 5.0]),
        ("model.layers.5.self_attn.v_bmm_quantizer", [6.0, 7.0]),
        ("model.layers.5.mlp.experts.1.gate_proj.input_quantizer", [0.5, NAN]),
        ("model.layers.5.mlp.experts.1.up_proj", [0.5, NAN]),
        ("model.layers.5.mlp.experts.2.up_proj.weight_quantizer", 1.0),
        ("model.layers.5.mlp.experts.gate_up_proj_input_quantizer", [1.0, NAN]),
        ("model.layers.5.mlp.experts.gate_up_proj_weight_quantizers.0", 3.0),
        ("model.layers.5.mlp.experts.gate_up_proj_weight_quantizers.2", 3.0),
        ("model.layers.5.mlp.experts.down_proj_input_quantizer", 8.0),
        ("model.layers.5.mlp.experts.1.down_proj.input_quantizer", 8.0),
        ("memory.3.attention.query.input_quantizer", [1.0, 2.0]),
    ],
)
def test_amax_by_hub_name_and_by_modelopt_name(reader: Calibration, name: str, expected: object) -> None:
    amax = reader.amax(name)
    assert amax.dtype == np.float32
    np.testing.assert_array_equal(amax, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.3.self_attn.q_prj.input_quantizer", r"model\.layers\.3\.self_attn\.q_proj \(input\)"),
        ("model.layers.9.self_attn.q_proj", "statistics in layers 3 to 5"),
        ("model.layers.5.mlp.experts.3.gate_proj", "numbered 0 to 2"),
        ("model.layers.5.mlp.experts.gate_up_input_quantizer", r"gate_up_proj_input_quantizer"),
        ("model.layers.9.mlp.experts.gate_up_proj_input_quantizer", "has no layer 9"),
        ("model.layers.5.mlp.experts.gate_up_proj_weight_quantizers.7", "numbered 0 to 2"),
        ("lm_head.output_quantizer", "no quantizer 'lm_head.output_quantizer'"),
        ("model.layers.3.self_attn.k_bmm_quantizer", "statistics in layers 5 to 5"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(reader: Calibration, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reader.amax(name)


def test_statistic_of_a_site(reader: Calibration) -> None:
    site = Site("model.layers.5.self_attn", "k")
    np.testing.assert_array_equal(reader.statistic("amax", site), np.array([4.0, 5.0], np.float32))
    with pytest.raises(InputError, match="has amax, no 'tokens'"):
        reader.statistic("tokens", site)


def test_what_was_read_cannot_be_changed_by_accident(reader: Calibration) -> None:
    with pytest.raises(ValueError, match="read-only"):
        reader.amax("lm_head")[0] = 1.0


def test_generation_gives_back_every_array_and_the_layout(reader: Calibration) -> None:
    generation = reader.generation()
    assert generation.layout == layout()
    np.testing.assert_equal(dict(generation.arrays), arrays_of(layout(), AMAX))


def test_counts_are_integers(finished: Path) -> None:
    reader = open_run(finished)
    for expert, expected in enumerate([15, 18, -1]):
        site = Site(f"model.layers.2.mlp.experts.{expert}.gate_proj", "input")
        np.testing.assert_array_equal(
            reader.statistic("tokens", site), np.array(expected, np.int64), strict=True
        )
