"""A checkpoint beside the model that it was made from: nothing dropped, added or changed, weights near."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.engines.algos import AWQ_SCALE
from stages.engines.kv import attention_of
from stages.model.matrices import StoredMatrix
from stages.model.skeleton import Skeleton
from stages.model.weights import map_tensor
from stages.progress import Progress
from stages.verify.dequantize import dequantized
from stages.verify.findings import Finding
from stages.verify.likeness import Likeness, Verdict
from stages.verify.modules import Inventory, Quantized
from state.names import split_name
from state.source import Source, TensorEntry

PIECE = 1 << 22
"""Elements of a weight that are compared at a time."""

NOT_KEPT = ("rotary_emb.inv_freq",)
"""What no engine reads and transformers computes anew."""


@dataclass
class Compared:
    """What a comparison found. scaled: modules whose weights agree once rows or columns are scaled. folded:
    plain tensors beside such modules that were changed with them.
    """

    findings: list[Finding] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """For people: what this comparison can't tell."""
        if not self.scaled:
            return []
        return [
            f"{len(self.scaled):,} weights are the source's with rows or columns scaled, as AWQ and "
            f"SmoothQuant do, and {len(self.folded):,} plain tensors changed beside them: whether the scales "
            "cancel out is not looked at"
        ]


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
    scaled_layers = set()
    for module in inventory.quantized.values():
        for name, matrix in _matrices(module, skeleton, source):
            if matrix.tensor not in source.tensors:
                found.findings.append(Finding("source-added", name, "the source has no such weight"))
                continue
            verdict = _likeness(module, name, matrix, checkpoint, source, found)
            if verdict == "scaled":
                found.scaled.append(name)
                scaled_layers.add(_layer(name))
        progress.advance(module.codes.nbytes)
    weights = {module.tensor("weight") for module in inventory.quantized.values()}
    for name in sorted(plain.keys() - weights):
        _unquantized(name, checkpoint, source, skeleton, scaled_layers, found)
        progress.advance(plain[name].nbytes)
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
) -> Verdict | None:
    """Compare a weight; None where it can't be, for a reason that other rules name."""
    algo, sizes = module.algo, module.sizes
    if (
        algo is None
        or sizes is None
        or any(
            leaf.required and leaf.role != "scalar" and leaf.name not in module.tensors
            for leaf in algo.leaves
        )
    ):
        return None
    if matrix.shape(source.tensors) != sizes:
        said = f"is of a weight {list(sizes)}, the source's is {list(matrix.shape(source.tensors))}"
        found.findings.append(Finding("source-weights", name, said))
        return None
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
        return None
    verdict = likeness.verdict
    if verdict == "off":
        factor = likeness.factor if likeness.scaled_error < 1 else None
        scaled = f", {factor:.3g} times it" if factor is not None and likeness.signs > 0.9 else ""
        said = f"is not near the source's: relative error {likeness.error:.3g}{scaled}"
        found.findings.append(Finding("source-weights", name, said))
    return verdict


def _stored(module: Quantized, checkpoint: Source, expert: int | None) -> dict[str, Tensor]:
    """A module's tensors by leaf; of a tensor of experts those of one, rows first."""
    found = {}
    for leaf, entry in module.tensors.items():
        values = map_tensor(checkpoint, entry.name)
        if expert is not None and values.dim() == 3:
            values = values[expert].mT if module.transposed else values[expert]
        found[leaf] = values
    return found


def _unquantized(
    name: str,
    checkpoint: Source,
    source: Source,
    skeleton: Skeleton,
    scaled_layers: set[str],
    found: Compared,
) -> None:
    entry, matrix = checkpoint.tensors[name], skeleton.matrix(name.removesuffix(".weight"))
    if attention_of(name) is not None:
        return
    if name in source.tensors:
        theirs = map_tensor(source, name)
    elif matrix.tensor in source.tensors:
        theirs = matrix.part(map_tensor(source, matrix.tensor, matrix.expert))
    else:
        found.findings.append(Finding("source-added", name, "the source has no such tensor"))
        return
    ours = map_tensor(checkpoint, name)
    if ours.shape != theirs.shape:
        said = f"is {list(ours.shape)}, the source's is {list(theirs.shape)}"
        found.findings.append(Finding("source-changed", name, said))
    elif not _same_bits(ours, theirs):
        if _layer(name) in scaled_layers and ours.is_floating_point() and ours.isfinite().all():
            found.folded.append(name)
        else:
            found.findings.append(Finding("source-changed", name, f"is not the source's, in {entry.dtype}"))


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
