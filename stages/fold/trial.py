"""The proof of a fold: a layer is changed as folding changes it, and must compute what it computed.

Scales are random powers of four, from 1/256 to 256. Dividing and multiplying by them is exact, as is the root
that relu² takes, so what folding leaves equal comes out equal to the bit, but for norms that add one to their
weight; and they are so far apart that a clamp, a bias or a consumer that was forgotten shows.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.fold.candidates import Attempt
from stages.fold.folds import FoldSite, Operand, fold_norm

TOLERANCE = 1e-4
"""Of what the division alone changes, and of the largest value."""

LARGEST_EXPONENT = 4

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrialLayer:
    """A layer to change and to run.

    part: the operand in the layer's memory, float32: `[out, in]` of its own module, `[out]` for biases and
    norms; None where memory holds it otherwise. run: everything the layer hands on, by name.
    """

    part: Callable[[Operand], Tensor | None]
    run: Callable[[], Outputs]


@dataclass(frozen=True)
class Verdict:
    """sites: what may be folded. failed: module → why its input can't be scaled."""

    sites: tuple[FoldSite, ...]
    failed: dict[str, str]


def try_all(attempts: Iterable[Attempt], layer: TrialLayer) -> Verdict:
    """Try every attempt alone, and what holds together once more."""
    expected = layer.run()
    attempts = list(attempts)
    if any(bool(values.isnan().any()) for values in expected.values()):
        why = "the layer's own outputs are not numbers, which proves nothing"
        return Verdict((), {module: why for attempt in attempts for module in attempt.consumers})
    sites: dict[str, FoldSite] = {}
    scaled: set[str] = set()
    failed: dict[str, str] = {}
    for attempt in attempts:
        for alternative in attempt.alternatives:
            names = {site.name for site in alternative}
            consumers = {part.module for site in alternative for part in site.consumers}
            taken = names & sites.keys() or consumers & scaled
            if not taken and _holds(alternative, layer, expected):
                sites |= {site.name: site for site in alternative}
                scaled |= consumers
                break
        else:
            failed |= dict.fromkeys(attempt.consumers, attempt.reason)
    every = tuple(sites.values())
    if every and not _holds(every, layer, expected):
        why = "folds that hold one by one do not hold together"
        return Verdict((), failed | {part.module: why for site in every for part in site.consumers})
    return Verdict(every, {module: why for module, why in failed.items() if module not in scaled})


def _holds(sites: Sequence[FoldSite], layer: TrialLayer, expected: Outputs) -> bool:
    """Whether the layer hands on what it did, and would not without the multiplication."""
    parts = {operand: layer.part(operand) for site in sites for operand in (*site.sources, *site.consumers)}
    before = {operand: part.clone() for operand, part in parts.items() if part is not None}
    if len(before) < len(parts):
        return False
    try:
        scales = {site.name: _divide(site, parts) for site in sites}
        alone = layer.run()
        for site in sites:
            for operand in site.consumers:
                _in(parts, operand).mul_(site.expand(scales[site.name]))
        return _equal(expected, layer.run(), alone)
    finally:
        for operand, values in before.items():
            _in(parts, operand).copy_(values)


def _divide(site: FoldSite, parts: Mapping[Operand, Tensor | None]) -> Tensor:
    """Divide a site's sources by a random scale. Returns the scale that took effect."""
    first = _in(parts, site.sources[0])
    generator = torch.Generator().manual_seed(zlib.crc32(site.name.encode()))
    exponents = torch.randint(-LARGEST_EXPONENT, LARGEST_EXPONENT + 1, (site.channels,), generator=generator)
    scale = torch.exp2(2.0 * exponents).to(first.device)
    if site.kind == "norm":
        weight, scale = fold_norm(first, scale, site.plus_one)
        first.copy_(weight)
    for operand in site.divided:
        part = _in(parts, operand)
        rows = site.module_rows(operand, scale)
        part.div_(rows if part.dim() == 1 else rows[:, None])
    return scale


def _in(parts: Mapping[Operand, Tensor | None], operand: Operand) -> Tensor:
    part = parts[operand]
    assert part is not None
    return part


def _equal(expected: Outputs, found: Outputs, alone: Outputs) -> bool:
    if not expected.keys() == found.keys() == alone.keys():
        return False
    shown = False
    for name, values in expected.items():
        difference, effect = _apart(values, found[name]), _apart(values, alone[name])
        if difference > TOLERANCE * min(effect, _largest(values)):
            return False
        shown = shown or effect > 0
    return shown


def _apart(values: Tensor, others: Tensor) -> float:
    """The largest difference; infinite for other shapes, or where only one of two values is finite."""
    if values.shape != others.shape:
        return float("inf")
    apart = (values.double() - others.double()).abs()
    apart = apart.masked_fill(values == others, 0.0)  # equal infinities: masked scores
    return float(apart.nan_to_num(nan=float("inf")).amax()) if apart.numel() else 0.0


def _largest(values: Tensor) -> float:
    finite = values.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.amax()) if finite.numel() else 0.0
