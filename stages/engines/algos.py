"""Every `quant_algo` that is known: the tensors that an engine asks a quantized linear for, and who asks.

A linear is `[rows, columns]`, W = values * scales. Experts are linears by themselves,
`experts.{i}.{gate,up,down}_proj.*`; engines fuse them while they load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil
from typing import Literal, NamedTuple

from stages.engines import Engine

Role = Literal["codes", "blocks", "scalar", "vector"]
Kind = Literal["linear", "experts"]

MIXED = "MIXED_PRECISION"
AWQ_SCALE = "pre_quant_scale"


class Leaf(NamedTuple):
    """A tensor of a linear, `MODULE.leaf`: what one of its elements spans, in rows and columns.

    rows, columns: of the weight; 0 stands for all of them. axes: of the tensor; 4 where blocks keep axes of
    length one behind their counts, as vLLM wants those of FP8_PB_WO. required: no engine does without it.
    dtype: safetensors' name; None: that of the model.
    """

    name: str
    role: Role
    dtype: str | None
    rows: int = 0
    columns: int = 0
    axes: int = 2
    required: bool = True

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that engines take for a weight `[rows, columns]`."""
        if self.role == "scalar":
            return ((), (1,))
        if self.role == "vector":
            return ((rows,),) if self.rows else ((columns,),)
        down, across = ceil(rows / self.rows), ceil(columns / self.columns)
        return ((down, 1, across, 1),) if self.axes == 4 else ((down, across),)


@dataclass(frozen=True, eq=False)
class Algo:
    """One `quant_algo`.

    leaves: its tensors, codes first. group_size: columns that share a scale, as configurations say it; None
    where they say nothing. equal: leaves that the members of a fused group must have in common, since an
    engine that runs them as one matrix keeps one value and does not re-express what stands under the others.
    divides: rows and columns must be multiples of these. loads: engine → the kinds of modules it loads;
    mixed: the same inside MIXED_PRECISION.
    """

    name: str
    leaves: tuple[Leaf, ...]
    group_size: int | None = None
    equal: tuple[str, ...] = ()
    divides: tuple[int, int] = (1, 1)
    loads: Mapping[Engine, frozenset[Kind]] = field(default_factory=dict)
    mixed: Mapping[Engine, frozenset[Kind]] = field(default_factory=dict)

    @property
    def codes(self) -> Leaf:
        """The packed weight."""
        return self.leaves[0]

    def sizes(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the weight whose codes have a shape."""
        return stored[0] * self.codes.rows, stored[1] * self.codes.columns

    def leaf(self, name: str) -> Leaf | None:
        """The tensor of this name; None where the format has none."""
        return next((leaf for leaf in self.leaves if leaf.name == name), None)


BOTH: frozenset[Kind] = frozenset({"linear", "experts"})
LINEAR: frozenset[Kind] = frozenset({"linear"})
EVERYWHERE: dict[Engine, frozenset[Kind]] = {"vllm": BOTH, "sglang": BOTH, "trtllm": BOTH}
VLLM_SGLANG: dict[Engine, frozenset[Kind]] = {"vllm": BOTH, "sglang": BOTH}

_NVFP4 = (
    Leaf("weight", "codes", "U8", 1, 2),
    Leaf("weight_scale", "blocks", "F8_E4M3", 1, 16),
    Leaf("weight_scale_2", "scalar", "F32"),
)
_INT4 = (Leaf("weight", "codes", "U8", 2, 1), Leaf("weight_scale", "blocks", "F32", 1, 128))
_INPUT = Leaf("input_scale", "scalar", "F32")
_OPTIONAL_INPUT = _INPUT._replace(required=False)
_E4M3 = Leaf("weight", "codes", "F8_E4M3", 1, 1)
_SEPARATE = Leaf(AWQ_SCALE, "vector", None, 0, 1, required=False)

ALGOS: dict[str, Algo] = {
    algo.name: algo
    for algo in (
        Algo(
            "NVFP4", (*_NVFP4, _INPUT), 16, ("weight_scale_2", "input_scale"), (1, 16), EVERYWHERE, EVERYWHERE
        ),
        Algo(
            "W4A16_NVFP4",
            (*_NVFP4, _OPTIONAL_INPUT),
            16,
            ("weight_scale_2",),
            (1, 16),
            VLLM_SGLANG,
            VLLM_SGLANG,
        ),
        Algo(
            "FP8",
            (_E4M3, Leaf("weight_scale", "scalar", "F32"), _INPUT),
            loads=EVERYWHERE,
            mixed=EVERYWHERE,
        ),
        Algo(
            "FP8_PER_CHANNEL_PER_TOKEN",
            (_E4M3, Leaf("weight_scale", "vector", "F32", 1)),
            loads={"vllm": LINEAR},
            mixed={"vllm": LINEAR},
        ),
        Algo(
            "FP8_PB_WO",
            (_E4M3, Leaf("weight_scale", "blocks", "F32", 128, 128, axes=4)),
            divides=(1, 128),
            loads={"vllm": LINEAR},
            mixed=VLLM_SGLANG,
        ),
        Algo(
            "MXFP8",
            (_E4M3, Leaf("weight_scale", "blocks", "U8", 1, 32)),
            32,
            divides=(1, 32),
            loads={"vllm": BOTH},
            mixed=VLLM_SGLANG,
        ),
        Algo(
            "MXFP4",
            (Leaf("weight", "codes", "U8", 1, 2), Leaf("weight_scale", "blocks", "U8", 1, 32)),
            32,
            divides=(1, 32),
        ),
        Algo(
            "NVFP4_AWQ",
            (*_NVFP4, _INPUT, _SEPARATE),
            16,
            ("weight_scale_2", "input_scale"),
            (1, 16),
            loads={"sglang": LINEAR},
        ),
        Algo("W4A16_AWQ", (*_INT4, _SEPARATE), 128, divides=(2, 128)),
        Algo(
            "W4A8_AWQ",
            (*_INT4, Leaf("weight_scale_2", "scalar", "F32"), _INPUT, _SEPARATE),
            128,
            ("weight_scale_2",),
            (2, 128),
        ),
        Algo(
            "W8A8_SQ_PER_CHANNEL",
            (
                Leaf("weight", "codes", "I8", 1, 1),
                Leaf("weight_scale", "vector", "F32", 1),
                _INPUT,
                _SEPARATE,
            ),
        ),
        Algo("W8A16", (Leaf("weight", "codes", "I8", 1, 1), Leaf("weight_scale", "vector", "F32", 1))),
    )
}

LEAVES = frozenset(leaf.name for algo in ALGOS.values() for leaf in algo.leaves) - {"weight"}
"""Names of what stands beside a quantized weight."""

PACKED = frozenset({"U8", "I8", "F8_E4M3"})
"""Dtypes of codes, by safetensors' name; those of plain weights are others."""

INSTEAD = {
    "NVFP4_AWQ": "export with --fold auto, which folds the scales and writes plain NVFP4",
    "FP8_PER_CHANNEL_PER_TOKEN": "the recipe fp8 loads everywhere",
    "FP8_PB_WO": "the recipe fp8 loads everywhere",
    "MXFP8": "the recipe fp8 loads everywhere",
}
"""`quant_algo` → what to do where an engine does not load it."""
OTHERWISE = "choose a recipe such as nvfp4 or fp8"


LARGEST_GROUP = 1 << 16


@cache
def algo_in_groups(name: str | None, group_size: int | None = None) -> Algo | None:
    """A format by its name, with groups of another size where it has any; None for one that is not known, and
    for groups of no size.
    """
    algo = ALGOS.get(name or "")
    if algo is None or algo.group_size is None or group_size is None:
        return algo
    if group_size == algo.group_size:
        return algo
    if not 1 <= group_size <= LARGEST_GROUP:
        return None
    leaves = tuple(
        leaf._replace(columns=group_size) if leaf.role == "blocks" else leaf for leaf in algo.leaves
    )
    divides = (algo.divides[0], group_size)
    return replace(algo, leaves=leaves, group_size=group_size, divides=divides)


def refusal(engine: Engine, algo: str, kind: Kind, mixed: bool, group_size: int | None = None) -> str | None:
    """Why an engine does not load modules of a kind in a format, as the rest of a sentence; None: it does."""
    found = ALGOS.get(algo)
    if found is None:
        return f"knows no quant_algo {algo}"
    if found.group_size is not None and group_size not in (None, found.group_size):
        return f"loads {algo} in groups of {found.group_size} alone, not of {group_size}"
    table = found.mixed if mixed else found.loads
    if kind in table.get(engine, ()):
        return None
    where = f" inside {MIXED}" if mixed else ""
    what = " of experts" if kind == "experts" and "linear" in table.get(engine, ()) else ""
    return f"does not load {algo}{what}{where}"
