"""Where a site's statistics are: sites of equal pattern and shape share one array per statistic."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from typing import Literal, Self

from pydantic import Field, model_validator

from state.errors import InputError
from state.frozen import Frozen
from state.names import Role, Site, has_expert, has_layer, join_name, split_key, split_name
from state.statistics import STATISTICS

RelationKind = Literal["same_input", "norm_consumers", "engine_fused"]


class SiteArray(Frozen):
    """The sites of one pattern, role and shape. Axes are [layer, expert, channel], each only where it exists.

    Attributes:
        layers: real layer numbers, ascending; axis 0 is compact and follows them. Empty without a layer axis.
        experts: length of the expert axis.
        channels: length of the channel axis; None where a site has one value only.
        statistics: names of the registered statistics that every one of these sites has.
        several_shapes: other arrays have the same pattern and role, so the key carries the shape too.
    """

    pattern: str
    role: Role
    layers: tuple[int, ...] = ()
    experts: int | None = None
    channels: int | None = None
    statistics: tuple[str, ...]
    several_shapes: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if has_layer(self.pattern) != bool(self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"{self.pattern}: layers {self.layers} do not fit the pattern")
        if has_expert(self.pattern) != (self.experts is not None):
            raise ValueError(f"{self.pattern}: {self.experts} experts do not fit the pattern")
        if unknown := set(self.statistics) - set(STATISTICS):
            raise ValueError(f"{self.pattern}: no such statistic: {sorted(unknown)}")
        return self

    @cached_property
    def key(self) -> str:
        """Name of the array below each of its statistics."""
        sizes = "x".join(str(size) for size in (self.experts, self.channels) if size is not None)
        return f"{self.pattern}.{self.role}" + (f"@{sizes}" if self.several_shapes else "")

    def axes(self, statistic: str) -> tuple[str, ...]:
        """Names of the axes of `statistic`."""
        return tuple(
            name
            for name, present in (
                ("layer", bool(self.layers)),
                ("expert", self.experts is not None),
                ("channel", STATISTICS[statistic].per_channel and self.channels is not None),
            )
            if present
        )

    def shape(self, statistic: str) -> tuple[int, ...]:
        """Lengths of the axes of `statistic`."""
        sizes = {"layer": len(self.layers), "expert": self.experts or 0, "channel": self.channels or 0}
        return tuple(sizes[axis] for axis in self.axes(statistic))

    def sites(self) -> Iterator[Site]:
        """All sites of this array, by layer, then expert."""
        for layer in self.layers or (None,):
            for expert in range(self.experts) if self.experts is not None else (None,):
                yield Site(join_name(self.pattern, layer, expert), self.role)


class Relation(Frozen):
    """Modules that belong together in `layers` (empty: outside of layers).

    same_input: the same tensor object reached them; norm_consumers: all that read the output of `norm`, views
    included; engine_fused: inference engines fuse them, by name.
    """

    kind: RelationKind
    norm: str | None = None
    members: tuple[str, ...]
    layers: tuple[int, ...] = ()


class Layout(Frozen):
    """All arrays of a generation, the other names that lead to them, and how modules belong together.

    Attributes:
        aliases: `<pattern>.<role>` of a site that shares an observation -> that of the site that stores it.
        quantizers: pattern of a modelopt quantizer in memory -> `<pattern>.<role>` of every site behind it.
    """

    arrays: tuple[SiteArray, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    quantizers: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    relations: tuple[Relation, ...] = ()

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        keys = [array.key for array in self.arrays]
        if len(set(keys)) != len(keys):
            raise ValueError("two arrays have the same key")
        places = [
            (array.pattern, array.role, layer) for array in self.arrays for layer in array.layers or (None,)
        ]
        if len(set(places)) != len(places):
            raise ValueError("two arrays hold the same layer of the same pattern")
        return self

    def locate(self, site: Site) -> tuple[SiteArray, tuple[int, ...]]:
        """The array that holds `site`, directly or by alias, and the index of its leading (non-channel) axes.

        Raises:
            InputError: there is no such site; the message has the nearest names.
        """
        pattern, layer, expert = split_name(site.module)
        array = self.array(pattern, site.role, layer)
        if array is None:
            raise InputError(f"no statistics for {site.role} of {site.module!r}. {self._near(site)}")
        if array.experts is not None and (expert is None or expert >= array.experts):
            raise InputError(f"{site.module!r}: experts of this layer are numbered 0 to {array.experts - 1}")
        return array, tuple(
            index
            for index, present in (
                (array.layers.index(layer) if layer in array.layers else 0, bool(array.layers)),
                (expert or 0, array.experts is not None),
            )
            if present
        )

    def array(self, pattern: str, role: Role, layer: int | None) -> SiteArray | None:
        """The array that holds a pattern's layer, directly or by alias."""
        own = self._by_place.get((pattern, role, layer))
        if own is not None or f"{pattern}.{role}" not in self.aliases:
            return own
        target, target_role = split_key(self.aliases[f"{pattern}.{role}"])
        return self._by_place.get((target, target_role, layer if has_layer(target) else None))

    def groups(self, kind: RelationKind) -> list[tuple[str, ...]]:
        """Module names that belong together, one tuple per group, from the relations of one kind.

        Where every member is per expert, each expert's members are a group (gate and up of expert 5), but the
        consumers of a norm are always one group per layer.
        """
        groups: list[tuple[str, ...]] = []
        for relation in self.relations:
            if relation.kind != kind:
                continue
            each_expert = kind != "norm_consumers" and all(has_expert(member) for member in relation.members)
            for layer in relation.layers or (None,):
                expanded = [self._expand(member, layer) for member in relation.members]
                groups += (
                    list(zip(*expanded, strict=True))
                    if each_expert
                    else [tuple(chain.from_iterable(expanded))]
                )
        return groups

    def _expand(self, member: str, layer: int | None) -> list[str]:
        if not has_expert(member):
            return [join_name(member, layer)]
        array = self.array(member, "input", layer) or self.array(member, "weight", layer)
        if array is None or array.experts is None:
            raise InputError(f"a relation names {member!r} in layer {layer}, which no array of experts holds")
        return [join_name(member, layer, expert) for expert in range(array.experts)]

    @cached_property
    def _by_place(self) -> dict[tuple[str, Role, int | None], SiteArray]:
        return {
            (array.pattern, array.role, layer): array
            for array in self.arrays
            for layer in array.layers or (None,)
        }

    def _near(self, site: Site) -> str:
        pattern, layer, expert = split_name(site.module)
        layers = [
            place[2] for place in self._by_place if place[:2] == (pattern, site.role) and place[2] is not None
        ]
        if layers:
            return f"This module has statistics in layers {min(layers)} to {max(layers)}."
        keys = [f"{array.pattern}.{array.role}" for array in self.arrays] + list(self.aliases)
        near = get_close_matches(f"{pattern}.{site.role}", keys, n=3, cutoff=0.4)
        names = (
            join_name(split_key(key)[0], layer or 0, expert or 0) + f" ({split_key(key)[1]})" for key in near
        )
        return "Near names: " + (", ".join(names) or "none") + "."


def arrange(
    channels: Mapping[Site, int | None], statistics: Mapping[Role, tuple[str, ...]]
) -> tuple[SiteArray, ...]:
    """Group sites into arrays by pattern, role and shape.

    Args:
        channels: length of each site's channel axis; None for one value per site.
        statistics: names of the statistics that sites of each role have.

    Raises:
        InputError: the experts of a layer are not numbered 0 to n - 1.
    """
    experts: dict[tuple[str, Role, int | None, int | None], list[int | None]] = {}
    for site, width in channels.items():
        pattern, layer, expert = split_name(site.module)
        experts.setdefault((pattern, site.role, layer, width), []).append(expert)

    layers: dict[tuple[str, Role, int | None, int | None], list[int | None]] = {}
    for (pattern, role, layer, width), numbers in experts.items():
        count = len(numbers) if has_expert(pattern) else None
        if count is not None and set(numbers) != set(range(count)):
            raise InputError(
                f"{join_name(pattern, layer)}: {count} experts of width {width} are not numbered in order"
            )
        layers.setdefault((pattern, role, count, width), []).append(layer)

    several = _repeated((pattern, role) for pattern, role, _, _ in layers)
    return tuple(
        SiteArray(
            pattern=pattern,
            role=role,
            layers=tuple(sorted(layer for layer in numbers if layer is not None)),
            experts=count,
            channels=width,
            statistics=statistics[role],
            several_shapes=(pattern, role) in several,
        )
        for (pattern, role, count, width), numbers in layers.items()
    )


def _repeated(items: Iterable[tuple[str, Role]]) -> set[tuple[str, Role]]:
    seen: set[tuple[str, Role]] = set()
    return {item for item in items if item in seen or seen.add(item)}  # type: ignore[func-returns-value]
