"""What was proven of one decoder layer, as plain data: kept with a solution, read by export.

Names are patterns, with `L` for the layer and `E` for the expert, so that the proof of one layer is that of
every layer of its kind, and its size does not grow with the experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from stages.fold.folds import FoldMap, FoldSite, Operand
from state.errors import InputError
from state.names import has_expert, join_name, split_name

VERSION = 1


@dataclass(frozen=True)
class LayerProof:
    """kind: of layer that it holds for. experts: of such a layer. sites: as patterns. failed: pattern of a
    module → why its input can't be scaled.
    """

    kind: str
    experts: int
    sites: tuple[Mapping[str, Any], ...]
    failed: Mapping[str, str]

    @classmethod
    def of(cls, kind: str, sites: Iterable[FoldSite], failed: Mapping[str, str]) -> "LayerProof":
        """The proof of one layer."""
        patterns: dict[str, Mapping[str, Any]] = {}
        numbers: set[int | None] = set()
        for site in sites:
            patterns.setdefault(split_name(site.name)[0], _pattern(site))
            numbers |= {split_name(part.module)[2] for part in site.consumers}
        reasons = {split_name(name)[0]: why for name, why in failed.items()}
        return cls(kind, len(numbers - {None}), tuple(patterns.values()), reasons)

    def encode(self) -> dict[str, Any]:
        """JSON content; `decode` reads it."""
        return {"version": VERSION, **asdict(self), "sites": [dict(site) for site in self.sites]}

    @classmethod
    def decode(cls, content: Mapping[str, Any]) -> "LayerProof":
        """Raises InputError for a proof of another version."""
        if content["version"] != VERSION:
            raise InputError(
                f"the solution's proof of folding has version {content['version']}, and this Holdfast reads "
                f"{VERSION}; calibrate with this one into a new run"
            )
        return cls(content["kind"], content["experts"], tuple(content["sites"]), content["failed"])

    def sites_of(self, layer: int) -> Iterator[FoldSite]:
        """The sites of a layer of this kind."""
        for pattern in self.sites:
            numbers: Iterable[int | None] = range(self.experts) if has_expert(pattern["name"]) else (None,)
            for expert in numbers:
                yield _site(pattern, layer, expert, self.experts)

    def folds(self, layer: int, modules: Iterable[str]) -> FoldMap:
        """What may be folded in a layer of this kind, and for those of `modules` whose input can't be scaled
        the reason.
        """
        reasons = {module: self.failed.get(split_name(module)[0]) for module in modules}
        return FoldMap(
            {site.name: site for site in self.sites_of(layer)},
            {module: why for module, why in reasons.items() if why is not None},
        )


def _pattern(site: FoldSite) -> dict[str, Any]:
    """A site in pattern form; of sites and operands of all experts one stands for all."""
    consumers = {split_name(part.module)[0]: _operand_pattern(part) for part in site.consumers}
    return {
        **{name: value for name, value in asdict(site).items() if name not in ("sources", "consumers")},
        "name": split_name(site.name)[0],
        "sources": [_operand_pattern(part) for part in site.sources],
        "consumers": list(consumers.values()),
    }


def _operand_pattern(part: Operand) -> dict[str, Any]:
    return {
        **asdict(part),
        "module": split_name(part.module)[0],
        "tensor": split_name(part.tensor)[0],
        "shape": list(part.shape),
        "expert": part.expert is not None,
    }


def _site(pattern: Mapping[str, Any], layer: int, expert: int | None, experts: int) -> FoldSite:
    consumers: list[Operand] = []
    for part in pattern["consumers"]:
        numbers: Iterable[int | None] = (expert,)
        if expert is None and has_expert(part["module"]):
            numbers = range(experts)
        consumers += [_operand(part, layer, number) for number in numbers]
    site = FoldSite(**{**pattern, "sources": (), "consumers": tuple(consumers)})
    sources = tuple(_operand(part, layer, expert) for part in pattern["sources"])
    return replace(site, name=join_name(pattern["name"], layer, expert), sources=sources)


def _operand(part: Mapping[str, Any], layer: int, expert: int | None) -> Operand:
    return Operand(
        **{
            **part,
            "module": join_name(part["module"], layer, expert),
            "tensor": join_name(part["tensor"], layer, expert),
            "shape": tuple(part["shape"]),
            "expert": expert if part["expert"] else None,
        }
    )
