"""The tensors of a checkpoint by the modules that they belong to, from names, dtypes and shapes alone."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from stages.engines.algos import LEAVES, PACKED, Algo, algo_in_groups
from stages.engines.exclusion import matrix_of
from stages.engines.kv import attention_of
from stages.engines.stated import Stated
from state.source import TensorEntry

TOGETHER = re.compile(r".*experts\.[^.]+")
"""A tensor that holds a projection of all experts of a layer."""

FOREIGN = re.compile(
    r"weight_(packed|scale_inv|shape|zero_point|g_idx|global_scale)|input_global_scale|qweight|qzeros"
)
"""Leaves of other layouts of quantized checkpoints."""


@dataclass(frozen=True)
class Quantized:
    """A quantized module: a linear, an expert's projection, or a tensor that holds those of all experts.

    algo: what the configuration says that it is in; None where it says nothing that is known. tensors: leaf →
    what is there.
    """

    name: str
    algo: Algo | None
    tensors: Mapping[str, TensorEntry]
    together: bool = False

    @property
    def codes(self) -> TensorEntry:
        return self.tensors["weight"]

    def tensor(self, leaf: str) -> str:
        """The name of one of its tensors, whether it is there or not."""
        if not self.together:
            return f"{self.name}.{leaf}"
        return self.name if leaf == "weight" else f"{self.name}_{leaf}"

    @property
    def transposed(self) -> bool:
        """Whether a tensor of experts is `[experts, in, out]`, as its block scales show."""
        scale = self.tensors.get("weight_scale")
        return self.together and scale is not None and scale.shape[1:2] not in ((), self.codes.shape[1:2])

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Rows and columns of the weight, or of each expert's; None where the codes are no matrix of them."""
        matrix = self.codes.shape[1:] if self.together else self.codes.shape
        if self.algo is None or len(matrix) != 2:
            return None
        first, second = matrix[::-1] if self.transposed else matrix
        return self.algo.sizes((first, second))


@dataclass(frozen=True)
class Inventory:
    """All modules of a checkpoint.

    plain: unquantized linears and experts that engines build. stray: tensors that belong to a quantized
    module which is not there, or to another layout.
    """

    quantized: dict[str, Quantized] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    kv: tuple[str, ...] = ()
    stray: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        """All matrices, quantized or not, but for those that hold all experts of a layer."""
        return sorted(
            [*(name for name, module in self.quantized.items() if not module.together), *self.plain]
        )

    @property
    def together(self) -> list[str]:
        """The tensors that hold quantized experts of a layer."""
        return [name for name, module in self.quantized.items() if module.together]

    @property
    def algos(self) -> dict[str, str]:
        """Quantized module, but for tensors of experts → its format, where that is known."""
        found = {name: module.algo for name, module in self.quantized.items() if not module.together}
        return {name: algo.name for name, algo in found.items() if algo is not None}


def take_stock(
    tensors: Mapping[str, TensorEntry], stated: Stated, embeddings: Iterable[str] = ()
) -> Inventory:
    """Assign every tensor. embeddings: tensors of embeddings, beside those whose names say so."""
    packed = [name for name, entry in tensors.items() if entry.dtype in PACKED]
    modules = {name.removesuffix(".weight"): False for name in packed if name.endswith(".weight")}
    modules |= {
        name: True
        for name in packed
        if TOGETHER.fullmatch(name) and len(tensors[name].shape) == 3 and not _is_scale(name)
    }
    quantized, taken = {}, set[str]()
    for module, together in sorted(modules.items()):
        found = {}
        for leaf in ("weight", *sorted(LEAVES)):
            name = Quantized(module, None, {}, together).tensor(leaf)
            if name in tensors:
                found[leaf] = tensors[name]
                taken.add(name)
        algo = algo_in_groups(stated.algo_of(module), stated.group_of(module))
        quantized[module] = Quantized(module, algo, found, together)
    beside, plain, kv, stray = set(embeddings), [], [], []
    for name, entry in tensors.items():
        if name in taken or name in beside:
            continue
        leaf = _last(name)
        if attention_of(name) is not None:
            kv.append(name)
        elif leaf in LEAVES or FOREIGN.fullmatch(leaf) or _is_scale(name):
            stray.append(name)
        elif (linear := matrix_of(name, entry.shape)) is not None and "embed" not in _last(linear):
            plain.append(linear)
    return Inventory(quantized, tuple(sorted(set(plain))), tuple(kv), tuple(stray))


def _is_scale(name: str) -> bool:
    """Whether a tensor is named like a scale of a tensor of experts."""
    return any(name.endswith(f"_{leaf}") and TOGETHER.fullmatch(name) is not None for leaf in LEAVES)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
