"""Solve one decoder layer: scales under the constraints of folding, then clipping, a search of block scales
or GPTQ on the folded weights.

Everything is named as the hub names it, the experts of a projection stacked under one name with `E` for their
number. All experts are solved at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stages.fold.folds import FoldSite, Operand, TensorFold, fold_norm
from stages.formats import WeightFormat
from stages.formats.quantized import Quantized
from stages.formats.weight_format import tensor_amax
from stages.solve import awq_clip, awq_lite, gptq, scale_search
from stages.solve.moments import SiteStatistics, scaled, with_prior
from state.errors import InputError
from state.statistics import FEW_TOKENS

# A norm weight near zero (near -1 where the norm adds one) rounds so coarsely that the scale it can hold is
# no longer the one that was asked for. Such channels keep scale 1.
LARGEST_SHIFT = 2.0


@dataclass(frozen=True)
class Group:
    """Weights that read one site and that engines fuse, so that they share their scales: q/k/v, or gate/up.

    members: stacked hub name → float weights [E, N, K], E = 1 for a single linear. site: what they read.
    common_basis: the experts' inputs are the same kind of vector (see `with_prior`). together: a checkpoint
    holds all experts in one tensor, which has one scale.
    """

    members: dict[str, Tensor]
    site: SiteStatistics
    format: WeightFormat
    common_basis: bool
    together: bool = False

    @property
    def weights(self) -> Tensor:
        """All members along the output axis, [E, ΣN, K]."""
        return torch.cat(list(self.members.values()), dim=1)

    @property
    def moment(self) -> Tensor:
        """H that weights are judged by, each expert's with its prior: f32 [E, K, K]."""
        return with_prior(self.site, self.common_basis).second_moment

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Give each member its rows of [E, ΣN, ...] back."""
        sizes = [weights.shape[1] for weights in self.members.values()]
        return dict(zip(self.members, values.split(sizes, dim=1), strict=True))


@dataclass(frozen=True)
class Place:
    """A place to fold, all experts of a layer at once where it is theirs.

    site: the fold site, of expert 0 for experts. name: stacked. sources: stacked name → weight whose rows are
    divided; consumers: stacked names of all whose columns are multiplied. norm: the norm's weight as stored.
    """

    site: FoldSite
    name: str
    sources: Mapping[str, Operand]
    consumers: tuple[str, ...]
    norm: Tensor | None = None


@dataclass
class LayerSolution:
    """What was found: arrays by `<name>@<field>` and the policies that acted.

    latents: stacked name → what GPTQ rounded to, and its latents (`gptq.solve_latent`), where asked for.
    """

    latents: dict[str, tuple[Quantized, Tensor]] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    policies: list[dict[str, object]] = field(default_factory=list)

    def keep(self, name: str, quantized: Quantized) -> None:
        """Keep how a stacked matrix [E, N, K] was rounded."""
        for name_of_field, own in quantized.encoded().items():
            self.arrays[f"{name}@{name_of_field}"] = own if _is_stacked(name) else own[0]


def solve_layer(
    groups: Mapping[str, Group],
    places: list[Place],
    scales_by_awq: bool,
    clip: bool,
    sweep: bool,
    damping: float | None,
    latents: bool = False,
) -> LayerSolution:
    """Solve the quantized weights of one layer.

    Args:
        groups: by the name of the site they read; only what the recipe quantizes.
        places: where scales can be folded.
        scales_by_awq: search scales (awq_lite). clip: search clipping (awq_clip). sweep: search
            block scales (local_hessian). damping: of GPTQ, relative to the mean of H's diagonal; None to
            round to nearest. latents: keep GPTQ's.
    Raises InputError where one place feeds weights of different formats.
    """
    solution = LayerSolution()
    scales = _search(groups, places, solution) if scales_by_awq else {}
    for group in groups.values():
        folded = _fold_group(group, places, scales, with_site=clip or sweep or damping is not None)
        amax = _finish(folded, clip, sweep, damping, latents, solution)
        solution.arrays |= {f"{name}@weight_amax": amax for name in folded.members}
    for group in groups.values():  # at the end: to look at the tokens is to wait for a GPU
        solution.policies += _few(group)
    return solution


def _search(groups: Mapping[str, Group], places: list[Place], solution: LayerSolution) -> dict[str, Tensor]:
    """The scale of every place, by its stacked name: f32 [K], or [E, K] for a place of experts."""
    scales: dict[str, Tensor] = {}
    for place in places:
        readers = [group for group in groups.values() if set(group.members) & set(place.consumers)]
        if not readers:
            continue
        if len({group.format.name for group in readers}) > 1:
            raise InputError(f"{place.name} feeds weights of several formats; one scale can't serve them all")
        found = _search_place(place, readers)
        scales[place.name] = found.scale
        solution.arrays |= {
            f"{place.name}@scale": found.scale,
            f"{place.name}@alpha": found.alpha,
            f"{place.name}@losses": found.losses,
        }
    return scales


def _search_place(place: Place, readers: list[Group]) -> awq_lite.FoundScale:
    members = [awq_lite.Member(group.weights, group.site) for group in readers]
    weight_format = readers[0].format
    if place.site.kind == "norm":
        return awq_lite.search(members, weight_format, snap=_snap(place))
    if place.site.kind == "v_to_o":
        ties = place.site.columns(members[0].weights.device)
        found = awq_lite.search(members, weight_format, ties=ties)
        return replace(found, scale=found.scale[ties[:, 0]])  # one per free channel
    member, stacked = members[0], _is_stacked(place.name)
    if stacked:
        member = replace(member, site=with_prior(member.site, readers[0].common_basis))
    found = awq_lite.search_each(member, weight_format)
    return found if stacked else awq_lite.FoundScale(found.scale[0], found.alpha[0], found.losses[0])


def _snap(place: Place) -> Callable[[Tensor], Tensor]:
    norm = place.norm
    assert norm is not None

    def snap(scale: Tensor) -> Tensor:
        held = fold_norm(norm, scale, place.site.plus_one)[1]
        shift = held / scale
        return held.masked_fill((shift > LARGEST_SHIFT) | (shift < 1 / LARGEST_SHIFT), 1.0)

    return snap


def _is_stacked(name: str) -> bool:
    return "E" in name.split(".")


def _fold_group(group: Group, places: list[Place], scales: Mapping[str, Tensor], with_site: bool) -> Group:
    """The group with folded weights and, where wanted, the statistics of their scaled inputs; else those of
    the inputs as they were.
    """
    members, column = {}, None
    for name, weights in group.members.items():
        row = next(
            (
                place.site.module_rows(place.sources[name], scales[place.name])
                for place in places
                if name in place.sources and place.name in scales
            ),
            None,
        )
        column = next(
            (
                place.site.expand(scales[place.name])
                for place in places
                if name in place.consumers and place.name in scales
            ),
            None,
        )
        members[name] = TensorFold(_stacked(row, weights), _stacked(column, weights)).apply(weights)
    if column is None or not with_site:
        return replace(group, members=members)
    return replace(group, members=members, site=scaled(group.site, column))


def _stacked(factor: Tensor | None, weights: Tensor) -> Tensor | None:
    """A factor per row or column as [E, ...], to fit stacked weights."""
    return None if factor is None else factor.expand(len(weights), -1)


def _finish(
    group: Group, clip: bool, sweep: bool, damping: float | None, latents: bool, solution: LayerSolution
) -> Tensor:
    """Clip, rescale or compensate a folded group. Returns the amax its shared scale comes from, [E] ([] for
    one linear).
    """
    weights = group.weights
    amax = tensor_amax(weights)
    if clip:
        if group.format.grain == "tensor":
            amax = awq_clip.search_tensor(group.format, weights, group.moment).amax
        else:
            _keep_blocks(group, awq_clip.search_block(group.format, weights, group.moment).amax, solution)
    if group.together:
        amax = amax.amax(0, keepdim=True).repeat(len(amax), 1, 1)
    if sweep:
        _keep_blocks(group, scale_search.search(group.format, weights, group.moment, amax).amax, solution)
    if damping is not None:
        given = weights, group.moment, group.format, amax, damping
        if latents:
            quantized, values = gptq.solve_latent(*given)
            split = group.split(values)
            solution.latents |= {name: (own, split[name]) for name, own in _members(group, quantized).items()}
        else:
            quantized = gptq.solve(*given)
        for name, member in _members(group, quantized).items():
            solution.keep(name, member)
    flat = amax.reshape(-1)
    return flat if _is_stacked(next(iter(group.members))) else flat[0]


def _keep_blocks(group: Group, amax: Tensor, solution: LayerSolution) -> None:
    """Keep what each block's scale comes from, by member: [E, ΣN, blocks]."""
    for name, own in group.split(amax).items():
        solution.arrays[f"{name}@amax"] = own if _is_stacked(name) else own[0]


def _members(group: Group, quantized: Quantized) -> dict[str, Quantized]:
    """Each member's rows of a group that was quantized as one; a tensor's scale belongs to all of them."""
    values = group.split(quantized.values)
    shared = dict.fromkeys(group.members, quantized.scale)
    scales = shared if group.format.grain == "tensor" else group.split(quantized.scale)
    return {name: replace(quantized, values=values[name], scale=scales[name]) for name in group.members}


def _few(group: Group) -> list[dict[str, object]]:
    """The experts whose own tokens are too few: the layer's average stands in for them."""
    stacked = [name for name in group.members if _is_stacked(name)]
    few = [number for number, seen in enumerate(group.site.tokens.tolist()) if seen < FEW_TOKENS]
    return [
        {"policy": "layer-average", "modules": [name.replace(".E.", f".{expert}.") for expert in few]}
        for name in stacked
        if few
    ]
