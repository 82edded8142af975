"""A checkpoint beside the model that it was made from: nothing dropped, added or changed, weights near."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.engines.algos import AWQ_SCALE
from stages.engines.findings import Finding
from stages.engines.kv import attention_of
from stages.engines.modules import Inventory, Quantized
from stages.model.matrices import StoredMatrix
from stages.model.skeleton import Skeleton
from stages.model.weights import map_tensor
from stages.progress import Progress
from stages.verify.dequantize import dequantized
from stages.verify.folded import best_of, explained_by, moved_scales
from stages.verify.likeness import SAME_SIGNS, Likeness
from state.names import split_name
from state.source import Source, TensorEntry

PIECE = 1 << 22
"""Elements of a weight that are compared at a time."""

ROUNDED = 2.0**-7
"""The largest relative error of a plain matrix that was scaled and rounded to 16 bits."""

NOT_KEPT = ("rotary_emb.inv_freq",)
"""What no engine reads and transformers computes anew."""


@dataclass
class Compared:
    """What a comparison found. scaled: modules whose weights agree once rows or columns are scaled, by what
    no tensor before them shows. moved: layer → norm that was changed → what it may have been divided by.
    explained: changed tensors that weights behind them account for.
    """

    findings: list[Finding] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    moved: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    explained: set[str] = field(default_factory=set)

    @property
    def left_out(self) -> list[str]:
        """For people: what this comparison can't tell."""
        if not self.scaled:
            return []
        return [
            f"{len(self.scaled):,} weights are the source's with rows or columns scaled, as AWQ does between "
            "two linears: whether the scales cancel out is not looked at"
        ]

    def scales_of(self, name: str, likeness: Likeness) -> Tensor | None:
        """The scales that a tensor's columns were multiplied with, if a changed norm of its layer shows them;
        that norm is explained then.
        """
        norms = self.moved.get(_layer(name), {})
        best = explained_by(likeness, norms)
        if best is None:
            return None
        norm, scales = best
        self.explained.add(norm)
        return scales


def compare(
    checkpoint: Source,
    inventory: Inventory,
    plain: Mapping[str, TensorEntry],
    source: Source,
    skeleton: Skeleton,
    progress: Progress,
) -> Compared:
    """Compare every tensor. plain: the checkpoint's, as they would be without quantization. skeleton: of the
    source.
    """
    found = Compared()
    used = {skeleton.matrix(name).tensor for name in inventory.quantized} | plain.keys()
    found.findings += _dropped(source, skeleton, used)
    weights = {module.tensor("weight") for module in inventory.quantized.values()}
    changed = []
    for name in sorted(plain.keys() - weights):
        if (theirs := _other(name, checkpoint, source, skeleton, found)) is not None:
            changed.append((name, theirs))
            scales = moved_scales(theirs, map_tensor(checkpoint, name))
            found.moved.setdefault(_layer(name), {})[name] = scales
        progress.advance(plain[name].nbytes)
    for module in inventory.quantized.values():
        for name, matrix in _matrices(module, skeleton, source):
            if matrix.tensor not in source.tensors:
                found.findings.append(Finding("source-added", name, "the source has no such weight"))
            else:
                _likeness(module, name, matrix, checkpoint, source, found)
        progress.advance(module.codes.nbytes)
    for name, theirs in changed:
        _explain(name, map_tensor(checkpoint, name), theirs, found)
    found.findings += [
        Finding("source-changed", name, f"is not the source's, in {plain[name].dtype}")
        for name, _ in changed
        if name not in found.explained
    ]
    return found


def _dropped(source: Source, skeleton: Skeleton, used: set[str]) -> Iterator[Finding]:
    tied = getattr(skeleton.model, "all_tied_weights_keys", {})
    for name in source.tensors:
        parameter, _ = skeleton.parameter_of.get(name, (name, 0))
        if name not in used and parameter not in tied and not name.endswith(NOT_KEPT):
            yield Finding("source-dropped", name, "the source has it")


def _matrices(module: Quantized, skeleton: Skeleton, source: Source) -> list[tuple[str, StoredMatrix]]:
    """The matrices that a quantized module holds, by name."""
    if not module.together:
        return [(module.name, skeleton.matrix(module.name))]
    experts = module.codes.shape[0]
    if module.name not in source.tensors:
        return [(module.name, StoredMatrix(module.name))]
    return [
        (f"{module.name}[{number}]", StoredMatrix(module.name, number, module.transposed))
        for number in range(experts)
    ]


def _likeness(
    module: Quantized, name: str, matrix: StoredMatrix, checkpoint: Source, source: Source, found: Compared
) -> None:
    """Compare a weight, where it can be; where not, other rules say why."""
    algo, sizes = module.algo, module.sizes
    if (
        algo is None
        or sizes is None
        or any(
            leaf.required and leaf.role != "scalar" and leaf.name not in module.tensors
            for leaf in algo.leaves
        )
    ):
        return
    if matrix.shape(source.tensors) != sizes:
        said = f"is of a weight {list(sizes)}, the source's is {list(matrix.shape(source.tensors))}"
        found.findings.append(Finding("source-weights", name, said))
        return
    theirs = matrix.part(map_tensor(source, matrix.tensor, matrix.expert))
    likeness = Likeness.of(sizes[1])
    stored = _stored(module, checkpoint, matrix.expert if module.together else None)
    step = max(128, PIECE // sizes[1] // 128 * 128)
    try:
        for start in range(0, sizes[0], step):
            rows = slice(start, min(start + step, sizes[0]))
            ours = dequantized(algo, stored, rows)
            if (scale := stored.get(AWQ_SCALE)) is not None:  # what the engine scales the input by instead
                ours = ours * scale.float()
            likeness.add(ours, theirs[rows].float())
    except (
        RuntimeError,
        IndexError,
        KeyError,
    ):  # shapes that contradict each other have findings of their own
        return
    verdict = likeness.verdict(found.scales_of(name, likeness))
    if verdict == "scaled":
        found.scaled.append(name)
    elif verdict == "off":
        factor = likeness.factor if likeness.signs > SAME_SIGNS else None
        times = f", {factor:.3g} times it" if factor is not None else ""
        said = f"is not near the source's: relative error {likeness.error:.3g}{times}"
        found.findings.append(Finding("source-weights", name, said))


def _stored(module: Quantized, checkpoint: Source, expert: int | None) -> dict[str, Tensor]:
    """A module's tensors by leaf; of a tensor of experts those of one, rows first."""
    found = {}
    for leaf, entry in module.tensors.items():
        values = map_tensor(checkpoint, entry.name)
        if expert is not None and values.dim() == 3:
            values = values[expert].mT if module.transposed else values[expert]
        found[leaf] = values
    return found


def _other(
    name: str, checkpoint: Source, source: Source, skeleton: Skeleton, found: Compared
) -> Tensor | None:
    """The source's tensor, where an unquantized one is another and of the same shape."""
    matrix = skeleton.matrix(name.removesuffix(".weight"))
    if attention_of(name) is not None:
        return None
    if name in source.tensors:
        theirs = map_tensor(source, name)
    elif matrix.tensor in source.tensors:
        theirs = matrix.part(map_tensor(source, matrix.tensor, matrix.expert))
    else:
        found.findings.append(Finding("source-added", name, "the source has no such tensor"))
        return None
    ours = map_tensor(checkpoint, name)
    if ours.shape == theirs.shape:
        return None if _same_bits(ours, theirs) else theirs
    said = f"is {list(ours.shape)}, the source's is {list(theirs.shape)}"
    found.findings.append(Finding("source-changed", name, said))
    return None


def _explain(name: str, ours: Tensor, theirs: Tensor, found: Compared) -> None:
    """Whether a changed matrix, such as a router's, was multiplied with what a norm of its layer was divided
    by.
    """
    if ours.dim() != 2 or not ours.is_floating_point():
        return
    likeness = Likeness.of(ours.shape[1])
    for mine, its in zip(ours.split(1024), theirs.split(1024), strict=True):
        likeness.add(mine.float(), its.float())
    error, norm, _ = best_of(likeness, found.moved.get(_layer(name), {}))
    if error < ROUNDED and norm in found.explained:
        found.explained.add(name)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether a tensor is another one, bit for bit, or that one in another dtype of floats."""
    flat, other = ours.reshape(-1), theirs.reshape(-1)
    for mine, its in zip(flat.split(PIECE), other.split(PIECE), strict=True):
        if mine.dtype != its.dtype:
            its = its.to(mine.dtype)
        if not torch.equal(mine.contiguous().view(torch.uint8), its.contiguous().view(torch.uint8)):
            return False
    return True


def _layer(name: str) -> str:
    """The name up to the number of the decoder layer; all of it where there is none."""
    _, layer, _ = split_name(name.partition("[")[0])
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1]) if layer is not None else name
