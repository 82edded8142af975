"""Which statistics a run keeps, and in which arrays: from a model's modules and their relations to the
store's layout.
"""

from stages.calibrate.observe.relations import Probe, relations
from stages.model.modules import ExpertsModule
from stages.model.skeleton import Skeleton
from state.layout import Layout, Relation, arrange
from state.names import Role, Site, split_name

ACTIVATIONS = ("amax", "abs_sum", "tokens")
STATISTICS_OF: dict[Role, tuple[str, ...]] = {
    "input": ACTIVATIONS,
    "k": ACTIVATIONS,
    "v": ACTIVATIONS,
    "weight": ("weight_amax",),
}


def plan_layout(skeleton: Skeleton, found: Probe) -> Layout:
    """All sites of a model as arrays: linear, router and expert inputs, K and V, and the largest weight of
    each projection.

    Modules that always read the same tensor share one observation; the others become aliases of the first.
    """
    related = relations(skeleton, found)
    channels: dict[Site, int | None] = {}
    for linear in skeleton.linears:
        channels[Site(linear.hub, "input")] = linear.in_features
        channels[Site(linear.hub, "weight")] = None
    for experts in skeleton.experts:
        channels |= _expert_sites(experts)
    for attention, (keys, values) in found.kv_channels.items():
        channels |= {Site(attention, "k"): keys, Site(attention, "v"): values}
    aliases = _aliases(related, channels)
    stored = {site: width for site, width in channels.items() if _key(site) not in aliases}
    return Layout(
        arrays=arrange(stored, STATISTICS_OF),
        aliases=aliases,
        quantizers=_quantizers(skeleton, found),
        relations=related,
    )


def _expert_sites(experts: ExpertsModule) -> dict[Site, int | None]:
    sites: dict[Site, int | None] = {}
    for number in range(experts.count):
        for leaf in experts.up:
            sites[Site(f"{experts.hub}.{number}.{leaf}", "input")] = experts.hidden
        sites[Site(f"{experts.hub}.{number}.{experts.down}", "input")] = experts.intermediate
        for projection in experts.projections(number):
            sites[Site(projection, "weight")] = None
    return sites


def _aliases(related: tuple[Relation, ...], channels: dict[Site, int | None]) -> dict[str, str]:
    """`pattern.input` of every later member of a same-input group → that of the first.

    Only where the group holds in every layer the member occurs in, with equal width: an alias stands for a
    whole pattern.
    """
    layers: dict[str, set[int | None]] = {}
    widths: dict[str, set[int | None]] = {}
    for site, width in channels.items():
        pattern, layer, _ = split_name(site.module)
        if site.role == "input":
            layers.setdefault(pattern, set()).add(layer)
            widths.setdefault(pattern, set()).add(width)
    aliases: dict[str, str] = {}
    for relation in related:
        held: set[int | None] = set(relation.layers) or {None}
        first = relation.members[0]
        if relation.kind != "same_input" or f"{first}.input" in aliases:
            continue
        for member in relation.members[1:]:
            if layers[member] <= held and len(widths[first] | widths[member]) == 1:
                aliases.setdefault(f"{member}.input", f"{first}.input")
    return aliases


def quantizer_sites(skeleton: Skeleton, found: Probe) -> dict[str, list[Site]]:
    """Every input, K and V quantizer as modelopt names it in memory → the sites behind it.

    modelopt gives all experts of a layer one input quantizer per projection.
    """
    sites: dict[str, list[Site]] = {}
    for linear in skeleton.linears:
        sites.setdefault(f"{linear.memory}.input_quantizer", []).append(Site(linear.hub, "input"))
    for experts in skeleton.experts:
        for parameter, leaves in ((experts.up_parameter, experts.up), ("down_proj", (experts.down,))):
            sites[f"{experts.memory}.{parameter}_input_quantizer"] = [
                Site(f"{experts.hub}.{number}.{leaf}", "input")
                for number in range(experts.count)
                for leaf in leaves
            ]
    for attention, memory in found.memory.items():
        sites[f"{memory}.k_bmm_quantizer"] = [Site(attention, "k")]
        sites[f"{memory}.v_bmm_quantizer"] = [Site(attention, "v")]
    return sites


def _quantizers(skeleton: Skeleton, found: Probe) -> dict[str, tuple[str, ...]]:
    """Patterns of modelopt's quantizer names → keys of the sites behind them; weights of experts included."""
    names = quantizer_sites(skeleton, found)
    for linear in skeleton.linears:
        names.setdefault(f"{linear.memory}.weight_quantizer", []).append(Site(linear.hub, "weight"))
    for experts in skeleton.experts:
        for parameter, leaves in ((experts.up_parameter, experts.up), ("down_proj", (experts.down,))):
            names[f"{experts.memory}.{parameter}_weight_quantizers.0"] = [
                Site(f"{experts.hub}.0.{leaf}", "weight") for leaf in leaves
            ]
    return {
        split_name(name)[0]: tuple(dict.fromkeys(_key(site) for site in sites))
        for name, sites in names.items()
    }


def _key(site: Site) -> str:
    return f"{split_name(site.module)[0]}.{site.role}"
